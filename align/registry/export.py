"""A version as one file that another registry, on another machine, takes in: a plain tar with checksums.

ALIGN_EXPORT.json            which versions, in the order to take them in: a base before its adapter
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
from align.registry import durable, fingerprints, hub, layout
from align.registry.checkpoint import MANIFEST, MANIFEST_FORMAT, Checkpoint
from align.registry.foreign import check_foreign
from align.registry.references import NAME
from align.registry.store import Registry

INDEX = "ALIGN_EXPORT.json"
SUMS = "SHA256SUMS"
EXPORT_FORMAT = 1
OUTSIDE = "outside"
"""the stage of a base that became a version by being exported"""

# What a base from outside needs to be loaded; notes, images and code stay where they are.
_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class Parcel:
    """One version to export: where it goes in the tar, its files {path: file}, and its manifest's bytes."""

    name: str
    version: int
    files: dict[str, Path]
    manifest: bytes

    @property
    def folder(self) -> str:
        """Its folder in the tar."""
        return f"models/{self.name}/{layout.version_folder(self.version)}"

    @property
    def digest(self) -> str:
        """The digest of its manifest."""
        return "sha256:" + hashlib.sha256(self.manifest).hexdigest()


def export(registry: Registry, reference: str, path: Path, with_base: bool = False) -> list[Parcel]:
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
    parcels = [_version(checkpoint)]
    if with_base and checkpoint.is_adapter:
        base = registry.resolve_base(checkpoint)
        parcels.insert(0, _version(base) if base.manifest else _outside(registry, base))
    _write(path, parcels)
    return parcels


def _version(checkpoint: Checkpoint) -> Parcel:
    checkpoint.check(hashes=True)
    folder, manifest = Path(checkpoint.location), checkpoint.manifest or {}
    files = {name: folder / name for name in manifest["files"]}
    return Parcel(manifest["name"], manifest["version"], files, (folder / MANIFEST).read_bytes())


def _outside(registry: Registry, base: Checkpoint) -> Parcel:
    """A base that is no registered version, made one for the journey; the same base always makes the same."""
    folder = hub.cached_snapshot(base.location, base.revision) if base.is_hub else Path(base.location)
    if folder is None:
        raise IntegrityError(f"export with {base.reference}: it was never downloaded; leave --with-base out")
    check_foreign(folder, base.reference)
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in _MODEL_SUFFIXES}
    digests = registry.base_digests(folder)
    plain = re.sub(r"[^a-z0-9._-]+", "-", (base.location if base.is_hub else folder.name).rpartition("/")[2].lower())
    name = plain.lstrip("._-")[:64]
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
    measured = {key: {"sha256": durable.hash_file(path), "size": path.stat().st_size} for key, path in files.items()}
    return Parcel(name, 1, files, durable.seal_text(fields, measured, MANIFEST).encode())


def _write(path: Path, parcels: list[Parcel]) -> None:
    """Write the tar beside its place and rename it when it is whole and durable."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with fresh.open("xb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for name, content in _members(parcels):
                    _add(tar, name, content)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.rename(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not say where
        raise
    finally:
        fresh.unlink(missing_ok=True)
    durable.fsync_folder(path.parent)


def _members(parcels: list[Parcel]) -> Iterator[tuple[str, bytes | Path]]:
    listed = [{"name": each.name, "version": each.version, "digest": each.digest} for each in parcels]
    yield INDEX, json.dumps({"align_export": EXPORT_FORMAT, "versions": listed}, indent=1).encode() + b"\n"
    yield SUMS, "".join(_sums(parcels)).encode()
    for parcel in parcels:
        for name, path in parcel.files.items():
            yield f"{parcel.folder}/{name}", path
        yield f"{parcel.folder}/{MANIFEST}", parcel.manifest


def _sums(parcels: list[Parcel]) -> Iterator[str]:
    for parcel in parcels:
        for name, entry in json.loads(parcel.manifest)["files"].items():
            yield f"{entry['sha256']}  {parcel.folder}/{name}\n"
        yield f"{parcel.digest.removeprefix('sha256:')}  {parcel.folder}/{MANIFEST}\n"


def _add(tar: tarfile.TarFile, name: str, content: bytes | Path) -> None:
    # Owner and time say nothing about a model; without them equal versions make equal files.
    member = tarfile.TarInfo(name)
    member.mode = 0o644
    if isinstance(content, bytes):
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
        return
    member.size = content.stat().st_size
    with content.open("rb") as stream:
        tar.addfile(member, stream)
