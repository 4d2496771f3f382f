"""Importing an exported version: nothing in the file is trusted before it is unpacked, measured and hashed."""

from __future__ import annotations

import json
import shutil
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from align.errors import IntegrityError, MachineError, UsageError, shorten
from align.registry import durable
from align.registry.checkpoint import MANIFEST, Checkpoint, read_folder
from align.registry.commit import Staging
from align.registry.disk_layout import version_number
from align.registry.export_archive import EXPORT_FORMAT, INDEX, OUTSIDE, SUMS
from align.registry.fingerprints import digest_file
from align.registry.references import NAME, check_name
from align.registry.store import Registry, added_files
from align.registry.untrusted import PICKLES

_MAX_MEMBERS = 10_000
_MAX_NAME_BYTES = 200
_MAX_INDEX_BYTES = 1 << 20


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
        self._check_room(registry)
        versions = self._read_index()
        with ExitStack() as stack:
            staged = []
            for number, entry in enumerate(versions, start=1):
                target = name if name is not None and number == len(versions) else entry["name"]
                staging = stack.enter_context(registry.stage(target))
                staged.append((target, staging, self._unpack(entry, staging.path)))
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

    def _check_room(self, registry: Registry) -> None:
        needed = sum(member.size for member in self.members.values())
        if needed > self.path.stat().st_size:
            raise self._refusal(f"announces {needed:,} bytes and has fewer; copy it again")
        free = shutil.disk_usage(registry.root).free
        if needed > free:
            raise MachineError(
                f"import {self.path}: takes {needed:,} bytes, {free:,} are free in {registry.root}; free space"
            )

    def _read_index(self) -> list[dict[str, Any]]:
        """Return the versions the file announces; IntegrityError when it holds others."""
        if INDEX not in self.members or self.members[INDEX].size > _MAX_INDEX_BYTES:
            raise self._refusal(f"no {INDEX} in it; give a file that export wrote")
        try:
            with self._open(self.members[INDEX]) as stream:
                index = json.loads(bytes(stream.read()))
            written = int(index["align_export"])
            versions = [
                {"name": str(entry["name"]), "version": int(entry["version"]), "digest": str(entry["digest"])}
                for entry in index["versions"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"its {INDEX} cannot be read ({error}); copy it again") from None
        if written > EXPORT_FORMAT:
            raise self._refusal(f"export format {written}, this program knows {EXPORT_FORMAT}; update align")
        held = {version for version in map(_version_of, self.members) if version}
        if not versions or held != {(entry["name"], entry["version"]) for entry in versions}:
            raise self._refusal(f"holds other versions than its {INDEX} lists; copy it again")
        return versions

    def _unpack(self, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Unpack one version, check every byte of it, and return its manifest."""
        try:
            self._write_files(entry, folder)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise self._refusal(f"a file and a folder have one name ({error.filename}); export again") from None
        reference = f"{entry['name']}@v{entry['version']}"
        if not (folder / MANIFEST).is_file() or digest_file(folder / MANIFEST) != entry["digest"]:
            raise self._refusal(f"the manifest of {reference} is not the one that was exported; copy it again")
        manifest = durable.read_seal(folder, MANIFEST)
        unpacked = Checkpoint(reference, manifest.get("kind", "policy"), str(folder), manifest=manifest)
        problems = durable.verify_seal(folder, MANIFEST)
        problems += [f"{path}: is not in the manifest" for path in added_files(unpacked)]
        if problems:
            problem = problems[0].replace(f"{folder}/", "")
            raise self._refusal(f"{reference} is not as it was exported ({problem}); copy it again")
        if (manifest.get("name"), manifest.get("version")) != (entry["name"], entry["version"]):
            raise self._refusal(f"the manifest of {reference} is of another version; export it again")
        read_folder(folder, f"import {self.path}: {reference}")
        return manifest

    def _write_files(self, entry: dict[str, Any], folder: Path) -> None:
        for name, member in self.members.items():
            if _version_of(name) == (entry["name"], entry["version"]):
                target = folder.joinpath(*PurePosixPath(name).parts[3:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._open(member) as source, target.open("xb") as stream:
                    shutil.copyfileobj(source, stream)

    def _open(self, member: tarfile.TarInfo) -> Any:
        stream = self.tar.extractfile(member)
        if stream is None:
            raise tarfile.ReadError(f"{member.name} has no content")
        return stream


def _version_of(name: str) -> tuple[str, int] | None:
    """Return (name, version) of a member models/<name>/v0003/<file>."""
    parts = PurePosixPath(name).parts
    number = version_number(parts[2]) if len(parts) > 3 and parts[0] == "models" else None
    return (parts[1], number) if number and NAME.fullmatch(parts[1]) else None


def _commit(
    registry: Registry, name: str, staging: Staging, manifest: dict[str, Any], moved: dict[str, Checkpoint]
) -> ImportedVersion:
    """Commit an unpacked version unless it is here; `moved` collects those whose reference changed."""
    was, digest = f"{manifest['name']}@v{manifest['version']}", digest_file(staging.path / MANIFEST)
    same = _find_same(registry, name, manifest)
    checkpoint = same or staging.adopt(manifest, digest, _update_links(manifest, moved))
    if checkpoint.digest != digest or checkpoint.reference != was:
        moved[was] = checkpoint
    return ImportedVersion(was, checkpoint, present=same is not None)


def _find_same(registry: Registry, name: str, manifest: dict[str, Any]) -> Checkpoint | None:
    """Return the version of this name from the same commit; for a base exported unregistered, any that equals it."""
    commit_id = manifest.get("commit_id")
    same = (version for version in registry.versions(name) if (version.manifest or {}).get("commit_id") == commit_id)
    digests = (manifest.get("base") or {}).get("digests") or {}
    equal = registry.bases_like(digests) if manifest.get("stage") == OUTSIDE else iter(())
    return next(chain(same, equal), None)


def _update_links(manifest: dict[str, Any], moved: dict[str, Checkpoint]) -> dict[str, Any]:
    """Return the manifest fields that name a version which has another reference here."""
    changes: dict[str, Any] = {}
    parents = manifest.get("parents") or []
    base = manifest.get("base") or {}
    if any(link.get("reference") in moved for link in parents):
        changes["parents"] = [_update_link(link, moved) for link in parents]
    if base.get("reference") in moved:
        changes["base"] = {**base, "reference": moved[base["reference"]].reference}
    return changes


def _update_link(link: dict[str, Any], moved: dict[str, Checkpoint]) -> dict[str, Any]:
    checkpoint = moved.get(link.get("reference", ""))
    return {**link, "reference": checkpoint.reference, "digest": checkpoint.digest} if checkpoint else link
