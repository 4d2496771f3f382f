"""Committing: how a folder of files becomes an immutable version, whatever happens meanwhile."""

from __future__ import annotations

import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from align.errors import IntegrityError
from align.registry import durable, provenance
from align.registry.checkpoint import MANIFEST, MANIFEST_FORMAT, Checkpoint, read_version
from align.registry.durable import DISK, Disk
from align.registry.layout import version_folder, version_numbers
from align.schema import Kind

# Pickles run code when they are opened, and optimizer state belongs to a run, not to a model.
_REFUSED_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


class Staging:
    """A folder that becomes a version when it is committed and vanishes when it is not."""

    def __init__(self, path: Path, home: Path, root: Path, disk: Disk = DISK) -> None:
        """`home` is the folder of the name's versions, `root` the registry's."""
        self.path = path
        self._home = home
        self._root = root
        self._disk = disk

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, fields: dict[str, Any]) -> Checkpoint:
        """Make the folder's content durable and give it the next version of its name.

        `fields` are the manifest's: stage, kind, parents, base, data, metrics and so on. Name, version, digests, time,
        and what program this is are added here.
        """
        _check_fields(fields)
        _refuse_pickles(self.path)
        if self._home.is_symlink():
            raise IntegrityError(f"{self._home}: is a link; versions are kept in real folders, replace it")
        durable.make_folder(self._home, self._root, self._disk)
        files = durable.measure(self.path, MANIFEST, self._disk)
        if not files:
            raise IntegrityError(f"{self._home.name}: the folder to commit is empty; save the model there first")
        whole = {"versions": dict(provenance.library_versions()), **fields, **_stamp(self._home.name)}
        while True:
            version = max(version_numbers(self._home), default=0) + 1
            durable.write_seal(self.path, {**whole, "version": version}, files, MANIFEST, self._disk)
            target = self._home / version_folder(version)
            if durable.publish(self.path, target, MANIFEST, self._disk):
                durable.freeze(target)
                return read_version(target, self._home.name, version)


def _stamp(name: str) -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit_id": uuid.uuid4().hex,
        "git": provenance.git_revision(),
    }


def _check_fields(fields: dict[str, Any]) -> None:
    if fields.get("kind") not in get_args(Kind) or not fields.get("stage"):
        raise ValueError(f"a manifest needs stage and kind ({', '.join(get_args(Kind))}), got {sorted(fields)}")
    reserved = {"format", "name", "version", "created", "commit_id", "git", "files", "seal"} & set(fields)
    if reserved:
        raise ValueError(f"the registry fills {sorted(reserved)} itself")


def _refuse_pickles(folder: Path) -> None:
    for path in durable.walk_files(folder):
        if path.suffix in _REFUSED_SUFFIXES:
            name = path.relative_to(folder)
            raise IntegrityError(
                f"{name}: pickles and optimizer state never enter the registry; save safetensors and JSON only"
            )
