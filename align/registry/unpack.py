"""Taking an exported version in: nothing in the file is trusted until it is unpacked, weighed and hashed."""

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
from align.registry.export import EXPORT_FORMAT, INDEX, OUTSIDE, SUMS
from align.registry.fingerprints import digest_file
from align.registry.foreign import PICKLES
from align.registry.layout import version_number
from align.registry.references import NAME, check_name
from align.registry.staging import Staging
from align.registry.store import Registry, added_files

_MOST_MEMBERS = 10_000
_LONGEST = 200
_MOST_INDEX_BYTES = 1 << 20


@dataclass(frozen=True)
class Imported:
    """What became of a version in the file: its checkpoint here, and whether it was here before."""

    was: str
    checkpoint: Checkpoint
    known: bool


def import_file(registry: Registry, path: Path, name: str | None = None) -> list[Imported]:
    """Take in the versions of an exported file, the last of them under `name` when it is given.

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
            return _take_in(registry, tar, path, name)
    except (tarfile.TarError, EOFError, MemoryError, OverflowError) as error:  # a header may announce any size
        reason = error or "it announces a size that cannot be"
        raise IntegrityError(
            f"import {path}: not a whole tar file ({reason}); copy it again, and unpack it first if it is compressed"
        ) from None


def _take_in(registry: Registry, tar: tarfile.TarFile, path: Path, name: str | None) -> list[Imported]:
    members = _members(tar, path)
    _check_room(registry, members, path)
    versions = _index(tar, members, path)
    with ExitStack() as stack:
        # All of it is unpacked and checked before any of it is committed.
        staged = []
        for number, entry in enumerate(versions, start=1):
            target = name if name is not None and number == len(versions) else entry["name"]
            staging = stack.enter_context(registry.stage(target))
            staged.append((target, staging, _unpack(tar, members, entry, staging, path)))
        moved: dict[str, Checkpoint] = {}
        return [_commit(registry, target, staging, manifest, moved) for target, staging, manifest in staged]


def _members(tar: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.isdir():
            continue
        if problem := _objection(member, found):
            raise IntegrityError(f"import {path}: {shorten(member.name)} {problem}; only what export wrote is taken in")
        found[member.name] = member
    return found


def _objection(member: tarfile.TarInfo, found: dict[str, tarfile.TarInfo]) -> str | None:
    name = member.name
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        return "leaves the folder it is unpacked in"
    if str(PurePosixPath(name)) != name or max(map(len, name.encode(errors="replace").split(b"/"))) > _LONGEST:
        return "is no plain path"
    if not member.isreg() or member.issparse():
        return "is no regular file"
    if PurePosixPath(name).suffix.lower() in PICKLES:
        return "is a pickle, which can run code when it is opened"
    if name in found:
        return "is there twice"
    if len(found) >= _MOST_MEMBERS:
        return f"is one file too many, {_MOST_MEMBERS} at most"
    return None if name in (INDEX, SUMS) or _version_of(name) else "is in no version's folder"


def _version_of(name: str) -> tuple[str, int] | None:
    """(name, version) of a member models/<name>/v0003/<file>."""
    parts = PurePosixPath(name).parts
    number = version_number(parts[2]) if len(parts) > 3 and parts[0] == "models" else None
    return (parts[1], number) if number and NAME.fullmatch(parts[1]) else None


def _check_room(registry: Registry, members: dict[str, tarfile.TarInfo], path: Path) -> None:
    needed = sum(member.size for member in members.values())
    if needed > path.stat().st_size:
        raise IntegrityError(f"import {path}: announces {needed:,} bytes and has fewer; copy it again")
    free = shutil.disk_usage(registry.root).free
    if needed > free:
        raise MachineError(f"import {path}: takes {needed:,} bytes, {free:,} are free in {registry.root}; free space")


def _index(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], path: Path) -> list[dict[str, Any]]:
    """The versions a file says it holds, and no other."""
    if INDEX not in members or members[INDEX].size > _MOST_INDEX_BYTES:
        raise IntegrityError(f"import {path}: no {INDEX} in it; give a file that export wrote")
    try:
        index = json.loads(_read(tar, members[INDEX]))
        written = int(index["align_export"])
        versions = [
            {"name": str(each["name"]), "version": int(each["version"]), "digest": str(each["digest"])}
            for each in index["versions"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"import {path}: its {INDEX} cannot be read ({error}); copy it again") from None
    if written > EXPORT_FORMAT:
        raise IntegrityError(
            f"import {path}: export format {written}, this program knows {EXPORT_FORMAT}; update align"
        )
    held = {version for version in map(_version_of, members) if version}
    if not versions or held != {(each["name"], each["version"]) for each in versions}:
        raise IntegrityError(f"import {path}: holds other versions than its {INDEX} lists; copy it again")
    return versions


def _unpack(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], entry: dict[str, Any], staging: Staging, path: Path
) -> dict[str, Any]:
    """Unpack one version, check every byte of it, and return its manifest."""
    try:
        _write_out(tar, members, entry, staging.path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise IntegrityError(
            f"import {path}: a file and a folder have one name ({error.filename}); export again"
        ) from None
    what = f"{entry['name']}@v{entry['version']}"
    if not (staging.path / MANIFEST).is_file() or digest_file(staging.path / MANIFEST) != entry["digest"]:
        raise IntegrityError(f"import {path}: the manifest of {what} is not the one that was exported; copy it again")
    manifest = durable.read_seal(staging.path, MANIFEST)
    problems = durable.verify_seal(staging.path, MANIFEST)
    unpacked = Checkpoint(what, manifest.get("kind", "policy"), str(staging.path), manifest=manifest)
    problems += [f"{added}: is not in the manifest" for added in added_files(unpacked)]
    if problems:
        told = problems[0].replace(f"{staging.path}/", "")
        raise IntegrityError(f"import {path}: {what} is not as it was exported ({told}); copy it again")
    if (manifest.get("name"), manifest.get("version")) != (entry["name"], entry["version"]):
        raise IntegrityError(f"import {path}: the manifest of {what} is of another version; export it again")
    read_folder(staging.path, f"import {path}: {what}")
    return manifest


def _write_out(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], entry: dict[str, Any], folder: Path) -> None:
    for name, member in members.items():
        if _version_of(name) == (entry["name"], entry["version"]):
            target = folder.joinpath(*PurePosixPath(name).parts[3:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with _open(tar, member) as source, target.open("xb") as stream:
                shutil.copyfileobj(source, stream)


def _commit(
    registry: Registry, name: str, staging: Staging, manifest: dict[str, Any], moved: dict[str, Checkpoint]
) -> Imported:
    """Commit an unpacked version unless it is here; `moved` collects what got another reference than it had."""
    was, digest = f"{manifest['name']}@v{manifest['version']}", digest_file(staging.path / MANIFEST)
    here = _find(registry, name, manifest)
    checkpoint = here or staging.adopt(manifest, digest, _relinked(manifest, moved))
    if checkpoint.digest != digest or checkpoint.reference != was:
        moved[was] = checkpoint
    return Imported(was, checkpoint, known=here is not None)


def _find(registry: Registry, name: str, manifest: dict[str, Any]) -> Checkpoint | None:
    """The version of this name that was committed once as this one; for a base from outside, any that equals it."""
    same = (each for each in registry.versions(name) if _commit_id(each) == manifest.get("commit_id"))
    digests = (manifest.get("base") or {}).get("digests") or {}
    equal = registry.bases_like(digests) if manifest.get("stage") == OUTSIDE else iter(())
    return next(chain(same, equal), None)


def _commit_id(checkpoint: Checkpoint) -> str | None:
    return (checkpoint.manifest or {}).get("commit_id")


def _relinked(manifest: dict[str, Any], moved: dict[str, Checkpoint]) -> dict[str, Any]:
    """The fields that must change because a base that came along has another reference here."""
    changes: dict[str, Any] = {}
    parents = manifest.get("parents") or []
    base = manifest.get("base") or {}
    if any(link.get("reference") in moved for link in parents):
        changes["parents"] = [_relink(link, moved) for link in parents]
    if base.get("reference") in moved:
        changes["base"] = {**base, "reference": moved[base["reference"]].reference}
    return changes


def _relink(link: dict[str, Any], moved: dict[str, Checkpoint]) -> dict[str, Any]:
    found = moved.get(link.get("reference", ""))
    return {**link, "reference": found.reference, "digest": found.digest} if found else link


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _open(tar, member) as stream:
        return bytes(stream.read())


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    stream = tar.extractfile(member)
    if stream is None:
        raise tarfile.ReadError(f"{member.name} has no content")
    return stream
