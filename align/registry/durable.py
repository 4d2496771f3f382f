"""Durable file operations: acknowledged writes survive a power cut, and a torn folder is recognised.

A *sealed* folder holds a JSON file, written last, that lists every other file with its size and SHA-256. Registered
versions and training checkpoints are sealed folders; the fields of a seal belong to whoever writes it.
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
"""{path: {sha256, size}}"""


class Disk:
    """The operations whose order decides what survives a power cut; tests put a failing disk in its place."""

    def write(self, path: Path, data: bytes) -> None:
        """Write a whole file; nothing is durable yet."""
        path.write_bytes(data)

    def sync_file(self, path: Path) -> None:
        """Make a file's content durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make a folder's entries durable: its new, renamed and removed names."""
        Disk.sync_file(self, path)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder atomically; a file at `target` is replaced, a folder that is not empty is not."""
        os.rename(source, target)


DISK = Disk()


def write_durably(path: Path, data: bytes, disk: Disk = DISK) -> None:
    """Create or replace a file; a reader, or the next boot, sees the old content or the new, never a part."""
    # The dot keeps a left-over out of every listing.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        disk.write(temporary, data)
        disk.sync_file(temporary)
        disk.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    disk.sync_folder(path.parent)


def make_folder(folder: Path, top: Path, disk: Disk = DISK) -> None:
    """Create a folder below `top` and make every name on the way durable, whoever created it."""
    folder.mkdir(parents=True, exist_ok=True)
    while folder != top:
        folder = folder.parent
        disk.sync_folder(folder)


def move(source: Path, target: Path, disk: Disk = DISK) -> None:
    """Move a file or folder into another folder durably; a folder becomes writable by its owner."""
    if source.is_dir():
        # Moving a folder rewrites its `..`, which counts as writing to it.
        source.chmod(source.stat().st_mode | 0o200)
    disk.rename(source, target)
    # The new name first: a power cut between the two may leave both names, never neither.
    disk.sync_folder(target.parent)
    disk.sync_folder(source.parent)


def publish(folder: Path, target: Path, proof: str, disk: Disk = DISK) -> bool:
    """Rename a sealed folder to its final name; return False when that name was taken by another process.

    Success is decided by reading back the file named `proof`, because a network file system may report a failure for a
    rename that it carried out. That file's content must be unique.
    """
    written = (folder / proof).read_bytes()
    failure: OSError | None = None
    try:
        disk.rename(folder, target)
    except OSError as error:
        failure = error
    present = (target / proof).read_bytes() if (target / proof).is_file() else None
    if present == written:
        disk.sync_folder(target.parent)
        return True
    if failure is None:
        raise IntegrityError(f"{target}: what was just written reads back otherwise; check the file system")
    if failure.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise failure
    return False


def seal(folder: Path, fields: dict[str, Any], filename: str, disk: Disk = DISK) -> dict[str, Any]:
    """Make a folder's files durable, then write `filename` with `fields`, sizes and digests; return its content."""
    return write_seal(folder, fields, sync_and_digest(folder, filename, disk), filename, disk)


def sync_and_digest(folder: Path, filename: str, disk: Disk = DISK) -> Files:
    """Make everything below `folder` durable; return size and digest of every file but the seal `filename`."""
    sync_all(folder, disk)
    paths = {path.relative_to(folder).as_posix(): path for path in walk_files(folder)}
    return {name: describe_file(path) for name, path in paths.items() if name != filename}


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a seal holds of a file."""
    return {"sha256": hash_file(path), "size": path.stat().st_size}


def sync_all(folder: Path, disk: Disk = DISK) -> None:
    """Make every file and folder below `folder` durable."""
    for path in walk_files(folder):
        disk.sync_file(path)
    for inner in [*(path for path in sorted(folder.rglob("*")) if path.is_dir()), folder]:
        disk.sync_folder(inner)


def write_seal(folder: Path, fields: dict[str, Any], files: Files, filename: str, disk: Disk = DISK) -> dict[str, Any]:
    """Write the seal over files already digested; use `seal` unless the fields change between two tries."""
    text = seal_text(fields, files, filename)
    write_durably(folder / filename, text.encode(), disk)
    return dict(json.loads(text))


def seal_text(fields: dict[str, Any], files: Files, filename: str) -> str:
    """Return the content of a seal over files already digested."""
    try:
        body = json.loads(json.dumps({**fields, "files": files}, allow_nan=False))
    except ValueError as error:
        raise IntegrityError(f"{filename}: {error}; nothing was written, leave that value out of the fields") from None
    return json.dumps({**body, "seal": _seal_digest(body)}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_seal(folder: Path, filename: str) -> dict[str, Any]:
    """Return the seal of a folder; IntegrityError when it is absent, unreadable or does not match itself."""
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
    """Return the damage of a sealed folder, one line each; only sizes are compared when `hashes` is False."""
    try:
        sealed = read_seal(folder, filename)
    except IntegrityError as error:
        return [str(error)]
    problems = (_compare_file(folder, name, entry, hashes) for name, entry in sealed["files"].items())
    return [problem for problem in problems if problem]


def _compare_file(folder: Path, name: str, entry: dict[str, Any], hashes: bool) -> str | None:
    path = folder / name
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or any(part.is_symlink() for part in [path, *path.parents][: len(parts)]):
        return f"{path}: leaves its folder; links and .. are refused"
    if not path.is_file():
        return f"{path}: absent"
    size = path.stat().st_size
    problems = [f"{size} bytes, {entry.get('size')} were written"] if size != entry.get("size") else []
    if hashes and (digest := hash_file(path)) != entry.get("sha256"):
        problems.append(f"content has digest sha256:{digest}, sha256:{entry.get('sha256')} was written")
    return f"{path}: {'; '.join(problems)}" if problems else None


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield every regular file below a folder in name order; a link or a device is refused."""
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
    """Return whether nobody may write to a folder or to anything in it."""
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
    """Return the bytes of a file, or of all files below a folder; links count as nothing."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(inner.lstat().st_size for inner in inside if inner.is_file() and not inner.is_symlink())


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as bare hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal_digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
