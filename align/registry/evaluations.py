"""Evaluations of a version: records beside it, each written once and never changed.

    models/<name>/v0003.evaluations/20261123T051500.123456-1f0c2a9b.json

A version is immutable, so numbers measured later cannot be in it. A record names the version by reference and manifest
digest and seals itself with a digest of its content; `headline`, `data` and `created` are shown in listings, the other
fields belong to the evaluation. Export leaves records behind.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.registry import disk_layout, durable
from align.registry.checkpoint import Checkpoint
from align.registry.redaction import redact

if TYPE_CHECKING:
    from align.registry.store import Registry

FORMAT = 1


def add_record(registry: Registry, checkpoint: Checkpoint, fields: dict[str, Any]) -> Path:
    """Write one record beside a version of this registry, durably, and return its path; equal ones are not repeated.

    Raises UsageError for a checkpoint that is no version here.
    """
    if not is_version_of(registry, checkpoint):
        raise UsageError(f"{checkpoint.reference}: is no version of {registry.root}; only those keep evaluations")
    folder = _folder_of(checkpoint)
    clean = json.loads(json.dumps(redact(fields)))
    for path in _files(folder):
        record = _read(path) or {}
        if record.get("digest") == checkpoint.digest and all(record.get(key) == clean[key] for key in clean):
            return path
    registry.check_writable(checkpoint.name)
    durable.make_folder(folder, registry.root, registry.disk)
    now = datetime.now(UTC)
    path = folder / f"{now:%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}.json"
    stamp = {"format": FORMAT, "reference": checkpoint.reference, "digest": checkpoint.digest}
    sealed = {**clean, **stamp, "created": now.isoformat(timespec="seconds")}
    durable.write_durably(path, durable.seal_text(sealed, {}, path.name).encode(), registry.disk)
    return path


def is_version_of(registry: Registry, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is a version of this registry."""
    return checkpoint.manifest is not None and Path(checkpoint.location).parent.parent == registry.models


def read_records(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the whole records of a version, oldest first, without those of another version of the same number."""
    if checkpoint.manifest is None:
        return []
    records = (_read(path) for path in _files(_folder_of(checkpoint)))
    return [record for record in records if record and record.get("digest") == checkpoint.digest]


def newest_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the newest record that has a headline number."""
    return next((record for record in reversed(read_records(checkpoint)) if record.get("headline")), None)


def describe_headline(record: dict[str, Any]) -> str:
    """Return the main number of a record as text: `gold 0.871 [0.850, 0.893] on world-prompts-eval`."""
    headline = record.get("headline") or {}
    if not isinstance(headline.get("value"), int | float):
        return ""
    low, high = headline.get("low"), headline.get("high")
    interval = f" [{low:.3f}, {high:.3f}]" if isinstance(low, float) and isinstance(high, float) else ""
    data = (record.get("data") or {}).get("name")
    return f"{headline.get('name')} {headline['value']:.3f}{interval}" + (f" on {data}" if data else "")


def find_damaged(home: Path) -> list[Path]:
    """Return the records of a name's versions that are not as they were written."""
    folders = filter(disk_layout.is_evaluations, disk_layout.entries(home))
    return [path for folder in folders for path in _files(folder) if _read(path) is None]


def _folder_of(checkpoint: Checkpoint) -> Path:
    return Path(f"{checkpoint.location}.evaluations")


def _files(folder: Path) -> list[Path]:
    found = disk_layout.entries(folder)
    return [path for path in found if path.suffix == ".json" and not disk_layout.is_temporary(path)]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return durable.read_seal(path.parent, path.name)
    except IntegrityError:
        return None
