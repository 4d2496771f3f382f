"""Exporting a version as one file for a registry on another machine: a plain tar with checksums.

ALIGN_EXPORT.json            the versions in the order of import: a base before its adapter
SHA256SUMS                   for `sha256sum -c` after unpacking with tar
models/<name>/v0003/...      the files as they are in a registry, manifest included
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.errors import IntegrityError, UsageError
from align.registry import disk_layout, durable, fingerprints, model_hub
from align.registry.checkpoint import MANIFEST, MANIFEST_FORMAT, Checkpoint
from align.registry.references import NAME
from align.registry.store import Registry
from align.registry.untrusted import check_untrusted

INDEX = "ALIGN_EXPORT.json"
SUMS = "SHA256SUMS"
EXPORT_FORMAT = 1
OUTSIDE = "outside"
"""the stage of a base that became a version by being exported"""

# Files of an unregistered base that loading it needs; notes, images and code are left out.
_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class ExportItem:
    """One version to export: its name and number in the tar, its files {path: file}, and its manifest's bytes."""

    name: str
    version: int
    files: dict[str, Path]
    manifest: bytes

    @property
    def folder(self) -> str:
        """Its folder in the tar."""
        return f"models/{self.name}/{disk_layout.version_folder(self.version)}"

    @property
    def digest(self) -> str:
        """The digest of its manifest."""
        return "sha256:" + hashlib.sha256(self.manifest).hexdigest()


def export_version(registry: Registry, reference: str, path: Path, with_base: bool = False) -> list[ExportItem]:
    """Write a registered version, and with `with_base` the base under it, to a tar file that must not exist yet.

    Raises IntegrityError when something is not as it was committed.
    """
    checkpoint = registry.resolve(reference)
    if checkpoint.manifest is None:
        raise UsageError(f"export {reference}: not a registered version; only these can be exported")
    if path.exists():
        raise UsageError(f"export to {path}: is there already; choose another file or move it away")
    if not path.parent.is_dir():
        raise UsageError(f"export to {path}: no folder {path.parent}; create it first")
    items = [_registered_item(checkpoint)]
    if with_base and checkpoint.is_adapter:
        base = registry.resolve_base(checkpoint)
        items.insert(0, _registered_item(base) if base.manifest else _unregistered_item(registry, base))
    _write_tar(path, items)
    return items


def _registered_item(checkpoint: Checkpoint) -> ExportItem:
    checkpoint.check(hashes=True)
    folder, manifest = Path(checkpoint.location), checkpoint.manifest or {}
    files = {name: folder / name for name in manifest["files"]}
    return ExportItem(manifest["name"], manifest["version"], files, (folder / MANIFEST).read_bytes())


def _unregistered_item(registry: Registry, base: Checkpoint) -> ExportItem:
    """Return a base that is no registered version as one; the same base always gives the same manifest."""
    folder = model_hub.cached_snapshot(base.location, base.revision) if base.is_hub else Path(base.location)
    if folder is None:
        raise IntegrityError(f"export with {base.reference}: it was never downloaded; leave --with-base out")
    check_untrusted(folder, base.reference)
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _MODEL_SUFFIXES}
    digests = registry.base_digests(folder)
    title = (base.location if base.is_hub else folder.name).rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", title).lstrip("._-")[:64]
    name = name if NAME.fullmatch(name) else "base"
    fields: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "name": name,
        "version": 1,
        "stage": OUTSIDE,
        "kind": "base",
        "parents": [],
        "base": {"reference": None, "location": None, "digests": digests},
        "created": datetime.fromtimestamp(int(max(path.stat().st_mtime for path in files.values())), UTC).isoformat(),
        "commit_id": fingerprints.digest_json(digests)[7:39],
    }
    listed = {key: {"sha256": durable.hash_file(path), "size": path.stat().st_size} for key, path in files.items()}
    return ExportItem(name, 1, files, durable.seal_text(fields, listed, MANIFEST).encode())


def _write_tar(path: Path, items: list[ExportItem]) -> None:
    """Write the tar under a temporary name and rename it when it is whole and durable."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for name, content in _members(items):
                    _add_member(tar, name, content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    durable.fsync_folder(path.parent)


def _members(items: list[ExportItem]) -> Iterator[tuple[str, bytes | Path]]:
    versions = [{"name": item.name, "version": item.version, "digest": item.digest} for item in items]
    yield INDEX, json.dumps({"align_export": EXPORT_FORMAT, "versions": versions}, indent=1).encode() + b"\n"
    yield SUMS, "".join(_checksum_lines(items)).encode()
    for item in items:
        for name, path in item.files.items():
            yield f"{item.folder}/{name}", path
        yield f"{item.folder}/{MANIFEST}", item.manifest


def _checksum_lines(items: list[ExportItem]) -> Iterator[str]:
    for item in items:
        for name, entry in json.loads(item.manifest)["files"].items():
            yield f"{entry['sha256']}  {item.folder}/{name}\n"
        yield f"{item.digest.removeprefix('sha256:')}  {item.folder}/{MANIFEST}\n"


def _add_member(tar: tarfile.TarFile, name: str, content: bytes | Path) -> None:
    # Without owner and time equal versions make equal files.
    member = tarfile.TarInfo(name)
    member.mode = 0o644
    if isinstance(content, bytes):
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
        return
    member.size = content.stat().st_size
    with content.open("rb") as stream:
        tar.addfile(member, stream)
