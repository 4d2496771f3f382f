"""What was measured of a version after it was committed: records beside it, each written once and never changed.

    models/<name>/v0003.evaluations/20261123T051500.123456-1f0c2a9b.json

A version is immutable, so its later numbers cannot be in it. Each record names the version by reference and manifest
digest, seals itself with a digest of its own content, and holds whatever its maker put in; `headline`, `data` and
`created` are what listings show. Export leaves records behind: they are this registry's.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.registry import durable, layout
from align.registry.checkpoint import Checkpoint
from align.registry.redaction import redact

if TYPE_CHECKING:
    from align.registry.store import Registry

FORMAT = 1


def add(registry: Registry, checkpoint: Checkpoint, fields: dict[str, Any]) -> Path:
    """Write one record beside a version of this registry, durably, and give its path.

    What a record says already is not said twice. Raises UsageError for a checkpoint that is no version here.
    """
    if not belongs(registry, checkpoint):
        raise UsageError(f"{checkpoint.reference}: is no version of {registry.root}; only those keep evaluations")
    folder = folder_of(checkpoint)
    clean = json.loads(json.dumps(redact(fields)))
    if known := next((path for path in _files(folder) if _says(path, checkpoint, clean)), None):
        return known
    registry.check_writable(checkpoint.name)
    durable.make_folder(folder, registry.root, registry.disk)
    now = datetime.now(UTC)
    path = folder / f"{now:%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}.json"
    stamp = {
        "format": FORMAT,
        "reference": checkpoint.reference,
        "digest": checkpoint.digest,
        "created": now.isoformat(timespec="seconds"),
    }
    text = durable.seal_text({**clean, **stamp}, {}, path.name)
    durable.write_durably(path, text.encode(), registry.disk)
    return path


def belongs(registry: Registry, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a version of this registry."""
    return checkpoint.manifest is not None and Path(checkpoint.location).parent.parent == registry.models


def of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The whole records of a version, oldest first; those of another version of the same number are left out."""
    if checkpoint.manifest is None:
        return []
    found = (_read(path) for path in _files(folder_of(checkpoint)))
    return [record for record in found if record and record.get("digest") == checkpoint.digest]


def newest(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The newest record that has a headline number."""
    return next((record for record in reversed(of(checkpoint)) if record.get("headline")), None)


def headline(record: dict[str, Any]) -> str:
    """The telling number of a record in a few words: `gold 0.871 [0.850, 0.893] on world-prompts-eval`."""
    told = record.get("headline") or {}
    if not isinstance(told.get("value"), int | float):
        return ""
    low, high = told.get("low"), told.get("high")
    interval = f" [{low:.3f}, {high:.3f}]" if isinstance(low, float) and isinstance(high, float) else ""
    data = (record.get("data") or {}).get("name")
    return f"{told.get('name')} {told['value']:.3f}{interval}" + (f" on {data}" if data else "")


def problems(home: Path) -> Iterator[tuple[Path, str]]:
    """The records of a name's versions that are not as they were written, and what is wrong."""
    for folder in layout.entries(home):
        if layout.is_evaluations(folder):
            for path in _files(folder):
                if _read(path) is None:
                    yield path, "is not as it was written"


def folder_of(checkpoint: Checkpoint) -> Path:
    """Where the records of a version are."""
    return layout.evaluations_folder(Path(checkpoint.location))


def _files(folder: Path) -> list[Path]:
    return [path for path in layout.entries(folder) if path.suffix == ".json" and not layout.is_temporary(path)]


def _says(path: Path, checkpoint: Checkpoint, fields: dict[str, Any]) -> bool:
    """Whether a record is of this version and holds these fields."""
    record = _read(path) or {}
    return record.get("digest") == checkpoint.digest and all(record.get(key) == fields[key] for key in fields)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return durable.read_seal(path.parent, path.name)
    except IntegrityError:
        return None
