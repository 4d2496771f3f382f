"""A version as one file, written here and read by a registry on another machine: a plain tar with checksums.

ALIGN_EXPORT.json            the versions in the order of import: a base before its adapter
SHA256SUMS                   for `sha256sum -c` after unpacking with tar
models/<name>/v0003/...      the files as they are in a registry, manifest included

Nothing in a file that is imported is trusted before it is unpacked, measured and hashed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from align.errors import IntegrityError, MachineError, UsageError, shorten
from align.registry import disk_layout, durable, fingerprints
from align.registry.checkpoint import MANIFEST, MANIFEST_FORMAT, PICKLES, Checkpoint, check_untrusted, read_folder
from align.registry.commit import Staging
from align.registry.references import NAME, cached_snapshot, check_name
from align.registry.store import Registry, added_files

INDEX = "ALIGN_EXPORT.json"
SUMS = "SHA256SUMS"
EXPORT_FORMAT = 1
OUTSIDE = "outside"
"""the stage of a base that became a version by being exported"""

# Files of an unregistered base that loading it needs; notes, images and code are left out.
_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
_MAX_MEMBERS = 10_000
_MAX_NAME_BYTES = 200
_MAX_INDEX_BYTES = 1 << 20


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
    folder = cached_snapshot(base.location, base.revision) if base.is_hub else Path(base.location)
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
    listed = {key: durable.describe_file(path) for key, path in files.items()}
    return ExportItem(name, 1, files, durable.seal_text(fields, listed, MANIFEST).encode())


def _write_tar(path: Path, items: list[ExportItem]) -> None:
    """Write the tar under a temporary name and rename it when it is whole and durable."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for name, content in _members(items):
                    member = tarfile.TarInfo(name)  # without owner and time equal versions make equal files
                    member.mode = 0o644
                    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
                        member.size = source.seek(0, io.SEEK_END)
                        source.seek(0)
                        tar.addfile(member, source)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    durable.DISK.sync_folder(path.parent)


def _members(items: list[ExportItem]) -> Iterator[tuple[str, bytes | Path]]:
    versions = [{"name": item.name, "version": item.version, "digest": item.digest} for item in items]
    yield INDEX, json.dumps({"align_export": EXPORT_FORMAT, "versions": versions}, indent=1).encode() + b"\n"
    sums = list[str]()
    for item in items:
        digests = {name: entry["sha256"] for name, entry in json.loads(item.manifest)["files"].items()}
        digests[MANIFEST] = item.digest.removeprefix("sha256:")
        sums += [f"{digest}  {item.folder}/{name}\n" for name, digest in digests.items()]
    yield SUMS, "".join(sums).encode()
    for item in items:
        yield from ((f"{item.folder}/{name}", path) for name, path in item.files.items())
        yield f"{item.folder}/{MANIFEST}", item.manifest


@dataclass(frozen=True)
class ImportedVersion:
    """A version of the file: its reference there, its checkpoint here, and whether that was here before."""

    was: str
    checkpoint: Checkpoint
    present: bool


def import_file(registry: Registry, path: Path, name: str | None = None) -> list[ImportedVersion]:
    """Register the versions of an exported file, the last of them under `name` when it is given.

    Nothing is registered before everything in the file was checked. Raises IntegrityError for a file that is torn,
    changed or not an export, UsageError when there is no such file, MachineError without room for it.
    """
    if name is not None:
        check_name(name)
    if not path.is_file():
        raise UsageError(f"import {path}: no such file; give one that export wrote")
    registry.check_writable(name)
    try:
        with tarfile.open(path, "r:") as tar:
            return _Archive(tar, path).register(registry, name)
    except (tarfile.TarError, EOFError, MemoryError, OverflowError) as error:  # a header may announce any size
        reason = error or "it announces a size that cannot be"
        raise IntegrityError(
            f"import {path}: not a whole tar file ({reason}); copy it again, and unpack it first if it is compressed"
        ) from None


class _Archive:
    """An exported file that is open."""

    def __init__(self, tar: tarfile.TarFile, path: Path) -> None:
        self.tar = tar
        self.path = path
        self.members: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            if member.isdir():
                continue
            if problem := self._find_objection(member):
                raise self._refusal(f"{shorten(member.name)} {problem}; only what export wrote is taken in")
            self.members[member.name] = member

    def _refusal(self, text: str) -> IntegrityError:
        return IntegrityError(f"import {self.path}: {text}")

    def register(self, registry: Registry, name: str | None) -> list[ImportedVersion]:
        """Unpack and check all versions, then commit them."""
        needed = sum(member.size for member in self.members.values())
        if needed > self.path.stat().st_size:
            raise self._refusal(f"announces {needed:,} bytes and has fewer; copy it again")
        if needed > (free := shutil.disk_usage(registry.root).free):
            raise MachineError(
                f"import {self.path}: takes {needed:,} bytes, {free:,} are free in {registry.root}; free space"
            )
        versions = self._read_index()
        with ExitStack() as stack:
            staged = []
            for version in versions:
                target = name if name is not None and version is versions[-1] else version[0]
                staging = stack.enter_context(registry.stage(target))
                staged.append((target, staging, self._unpack(*version, staging.path)))
            moved: dict[str, Checkpoint] = {}
            return [_commit(registry, target, staging, manifest, moved) for target, staging, manifest in staged]

    def _find_objection(self, member: tarfile.TarInfo) -> str | None:
        name = member.name
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
            return "leaves the folder it is unpacked in"
        longest = max(map(len, name.encode(errors="replace").split(b"/")))
        if str(PurePosixPath(name)) != name or longest > _MAX_NAME_BYTES:
            return "is no plain path"
        if not member.isreg() or member.issparse():
            return "is no regular file"
        if PurePosixPath(name).suffix.lower() in PICKLES:
            return "is a pickle, which can run code when it is opened"
        if name in self.members:
            return "is there twice"
        if len(self.members) >= _MAX_MEMBERS:
            return f"is one file too many, {_MAX_MEMBERS} at most"
        return None if name in (INDEX, SUMS) or _version_of(name) else "is in no version's folder"

    def _read_index(self) -> list[tuple[str, int, str]]:
        """Return (name, version, digest) of those the file announces; IntegrityError when it holds others."""
        if INDEX not in self.members or self.members[INDEX].size > _MAX_INDEX_BYTES:
            raise self._refusal(f"no {INDEX} in it; give a file that export wrote")
        try:
            with self._open(self.members[INDEX]) as stream:
                index = json.loads(stream.read())
            written = int(index["align_export"])
            versions = [
                (str(entry["name"]), int(entry["version"]), str(entry["digest"])) for entry in index["versions"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"its {INDEX} cannot be read ({error}); copy it again") from None
        if written > EXPORT_FORMAT:
            raise self._refusal(f"export format {written}, this program knows {EXPORT_FORMAT}; update align")
        held = {version for version in map(_version_of, self.members) if version}
        if not versions or held != {(name, number) for name, number, _ in versions}:
            raise self._refusal(f"holds other versions than its {INDEX} lists; copy it again")
        return versions

    def _unpack(self, name: str, number: int, digest: str, folder: Path) -> dict[str, Any]:
        """Unpack one version, check every byte of it, and return its manifest."""
        try:
            for path, member in self.members.items():
                if _version_of(path) == (name, number):
                    target = folder.joinpath(*PurePosixPath(path).parts[3:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with self._open(member) as source, target.open("xb") as stream:
                        shutil.copyfileobj(source, stream)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise self._refusal(f"a file and a folder have one name ({error.filename}); export again") from None
        reference = f"{name}@v{number}"
        if not (folder / MANIFEST).is_file() or fingerprints.digest_file(folder / MANIFEST) != digest:
            raise self._refusal(f"the manifest of {reference} is not the one that was exported; copy it again")
        manifest = durable.read_seal(folder, MANIFEST)
        unpacked = Checkpoint(reference, manifest.get("kind", "policy"), str(folder), manifest=manifest)
        problems = durable.verify_seal(folder, MANIFEST)
        problems += [f"{path}: is not in the manifest" for path in added_files(unpacked)]
        if problems:
            problem = problems[0].replace(f"{folder}/", "")
            raise self._refusal(f"{reference} is not as it was exported ({problem}); copy it again")
        if (manifest.get("name"), manifest.get("version")) != (name, number):
            raise self._refusal(f"the manifest of {reference} is of another version; export it again")
        read_folder(folder, f"import {self.path}: {reference}")
        return manifest

    def _open(self, member: tarfile.TarInfo) -> IO[bytes]:
        return cast(IO[bytes], self.tar.extractfile(member))  # None only for what is no regular file


def _version_of(name: str) -> tuple[str, int] | None:
    """Return (name, version) of a member models/<name>/v0003/<file>."""
    parts = PurePosixPath(name).parts
    number = disk_layout.version_number(parts[2]) if len(parts) > 3 and parts[0] == "models" else None
    return (parts[1], number) if number and NAME.fullmatch(parts[1]) else None


def _commit(
    registry: Registry, name: str, staging: Staging, manifest: dict[str, Any], moved: dict[str, Checkpoint]
) -> ImportedVersion:
    """Commit an unpacked version unless it is here; `moved` collects those whose reference changed."""
    was = f"{manifest['name']}@v{manifest['version']}"
    digest = fingerprints.digest_file(staging.path / MANIFEST)
    parents, base = manifest.get("parents") or [], manifest.get("base") or {}
    same = (
        version
        for version in registry.versions(name)
        if (version.manifest or {}).get("commit_id") == manifest.get("commit_id")
    )
    # A base that was exported unregistered is here already when any base equals it.
    equal = registry.bases_like(base.get("digests") or {}) if manifest.get("stage") == OUTSIDE else ()
    present = next(chain(same, equal), None)
    # The fields that name a version which has another reference here.
    changes: dict[str, Any] = {}
    if any(link.get("reference") in moved for link in parents):
        here = ((link, moved.get(link.get("reference", ""))) for link in parents)
        changes["parents"] = [
            {**link, "reference": new.reference, "digest": new.digest} if new else link for link, new in here
        ]
    if base.get("reference") in moved:
        changes["base"] = {**base, "reference": moved[base["reference"]].reference}
    checkpoint = present or staging.adopt(manifest, digest, changes)
    if checkpoint.digest != digest or checkpoint.reference != was:
        moved[was] = checkpoint
    return ImportedVersion(was, checkpoint, present=present is not None)
