"""Durable file operations: what is acknowledged survives a power cut, and a torn folder can be told from a whole one.

A *sealed* folder holds a JSON file, written last, that lists every other file with its size and SHA-256. Registered
versions and training checkpoints are both sealed folders. What the fields of a seal mean is left to its owner.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from align.errors import IntegrityError

Files = dict[str, dict[str, Any]]


class Disk:
    """The operations whose order decides what survives a power cut; tests put a failing disk in its place."""

    def write(self, path: Path, data: bytes) -> None:
        """Write a whole file; nothing is durable yet."""
        path.write_bytes(data)

    def sync_file(self, path: Path) -> None:
        """Make a file's content durable."""
        _fsync(path)

    def sync_folder(self, path: Path) -> None:
        """Make a folder's entries durable: its new, renamed and removed names."""
        _fsync(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name at once; a file there is replaced, a folder that is not empty is not."""
        os.rename(source, target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


DISK = Disk()


def fsync_folder(folder: Path, disk: Disk = DISK) -> None:
    """Make the entries of one folder durable."""
    disk.sync_folder(folder)


def write_durably(path: Path, data: bytes, disk: Disk = DISK) -> None:
    """Create or replace a file so that a reader, or the next boot, sees the old content or the new, never a part."""
    # The dot keeps a left-over out of every listing.
    fresh = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        disk.write(fresh, data)
        disk.sync_file(fresh)
        disk.rename(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    disk.sync_folder(path.parent)


def make_folder(folder: Path, top: Path, disk: Disk = DISK) -> None:
    """Create a folder below `top` and make every name on the way durable, whoever created it."""
    folder.mkdir(parents=True, exist_ok=True)
    while folder != top:
        folder = folder.parent
        disk.sync_folder(folder)


def move(source: Path, target: Path, disk: Disk = DISK) -> None:
    """Give a file or folder a place in another folder, durably; a folder becomes writable by its owner."""
    if source.is_dir():
        # Moving a folder rewrites its `..`, which counts as writing to it.
        source.chmod(source.stat().st_mode | 0o200)
    disk.rename(source, target)
    # The new name first: a power cut between the two may leave both names, never neither.
    disk.sync_folder(target.parent)
    disk.sync_folder(source.parent)


def publish(folder: Path, target: Path, proof: str, disk: Disk = DISK) -> bool:
    """Rename a sealed folder to its final name; False when somebody else has taken that name.

    Whether it worked is decided by reading back the file named `proof`, because a network file system may report a
    failure for a rename that it carried out. That file must be unlike anybody else's.
    """
    ours = (folder / proof).read_bytes()
    failure: OSError | None = None
    try:
        disk.rename(folder, target)
    except OSError as error:
        failure = error
    theirs = (target / proof).read_bytes() if (target / proof).is_file() else None
    if theirs == ours:
        disk.sync_folder(target.parent)
        return True
    if failure is None:
        raise IntegrityError(f"{target}: what was just written reads back otherwise; check the file system")
    if failure.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise failure
    return False


def seal(folder: Path, fields: dict[str, Any], filename: str, disk: Disk = DISK) -> dict[str, Any]:
    """Make a folder's files durable, then write `filename` with `fields`, sizes and digests; returns its content."""
    return write_seal(folder, fields, measure(folder, filename, disk), filename, disk)


def measure(folder: Path, filename: str, disk: Disk = DISK) -> Files:
    """Make every file and folder below `folder` durable; returns {path: {sha256, size}} of all but the seal itself."""
    files: Files = {}
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if name != filename:
            disk.sync_file(path)
            files[name] = {"sha256": hash_file(path), "size": path.stat().st_size}
    _sync_folders(folder, disk)
    return files


def sync_all(folder: Path, disk: Disk = DISK) -> None:
    """Make every file and folder below `folder` durable."""
    for path in walk_files(folder):
        disk.sync_file(path)
    _sync_folders(folder, disk)


def _sync_folders(folder: Path, disk: Disk) -> None:
    for inner in [*(path for path in sorted(folder.rglob("*")) if path.is_dir()), folder]:
        disk.sync_folder(inner)


def write_seal(folder: Path, fields: dict[str, Any], files: Files, filename: str, disk: Disk = DISK) -> dict[str, Any]:
    """Write the seal over files already measured; use `seal` unless the fields change between two tries."""
    text = seal_text(fields, files, filename)
    write_durably(folder / filename, text.encode(), disk)
    return dict(json.loads(text))


def seal_text(fields: dict[str, Any], files: Files, filename: str) -> str:
    """What a seal over files already measured says."""
    try:
        body = json.loads(json.dumps({**fields, "files": files}, allow_nan=False))
    except ValueError as error:
        raise IntegrityError(f"{filename}: {error}; nothing was written, leave that value out of the fields") from None
    sealed = {**body, "seal": _seal_digest(body)}
    return json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_seal(folder: Path, filename: str) -> dict[str, Any]:
    """The seal of a folder; IntegrityError when it is absent, unreadable or does not match itself."""
    path = folder / filename
    try:
        sealed = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise IntegrityError(f"{path}: absent; the folder was never finished, write it anew") from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: cannot be read ({error}); restore the folder or write it anew") from None
    if not isinstance(sealed, dict) or not isinstance(sealed.get("files"), dict):
        raise IntegrityError(f"{path}: holds no list of files; it was written by another program")
    body = {key: value for key, value in sealed.items() if key != "seal"}
    if sealed.get("seal") != _seal_digest(body):
        raise IntegrityError(f"{path}: was changed after it was written; restore the folder or write it anew")
    return sealed


def verify_seal(folder: Path, filename: str, hashes: bool = True) -> list[str]:
    """What is wrong with a sealed folder, one line each; sizes only when `hashes` is False."""
    try:
        sealed = read_seal(folder, filename)
    except IntegrityError as error:
        return [str(error)]
    found = (_compare(folder, name, entry, hashes) for name, entry in sealed["files"].items())
    return [problem for problem in found if problem]


def _compare(folder: Path, name: str, entry: dict[str, Any], hashes: bool) -> str | None:
    path = folder / name
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or any(part.is_symlink() for part in [path, *path.parents][: len(parts)]):
        return f"{path}: leaves its folder; links and .. are refused"
    if not path.is_file():
        return f"{path}: absent"
    size = path.stat().st_size
    digests = ""
    if hashes and (digest := hash_file(path)) != entry.get("sha256"):
        digests = f"content has digest sha256:{digest}, sha256:{entry.get('sha256')} was written"
    if size != entry.get("size"):
        return f"{path}: {size} bytes, {entry.get('size')} were written" + (f"; {digests}" if digests else "")
    return f"{path}: {digests}" if digests else None


def walk_files(folder: Path) -> Iterator[Path]:
    """Every regular file below a folder in name order; a link or a device is refused."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise IntegrityError(f"{path}: is no regular file; copy the content itself into the folder")
        if path.is_file():
            yield path


def freeze(folder: Path) -> None:
    """Take away write permission from a folder and all it holds."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)


def is_frozen(folder: Path) -> bool:
    """Whether nobody may write to a folder or to anything in it."""
    return not any(path.lstat().st_mode & 0o222 for path in [*folder.rglob("*"), folder] if not path.is_symlink())


def erase(path: Path) -> None:
    """Delete a file or a folder for good, a frozen one too."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for inner in [path, *path.rglob("*")]:
        if inner.is_dir() and not inner.is_symlink():
            inner.chmod(inner.stat().st_mode | 0o700)
    shutil.rmtree(path)


def folder_size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as nothing."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(inner.lstat().st_size for inner in inside if inner.is_file() and not inner.is_symlink())


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as bare hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal_digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
