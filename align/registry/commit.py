"""Committing: a staged folder of files becomes an immutable version, or nothing at all."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import align
from align.errors import IntegrityError
from align.registry import disk_layout, durable
from align.registry.checkpoint import MANIFEST, MANIFEST_FORMAT, PICKLES, Checkpoint, read_version
from align.registry.durable import DISK, Disk
from align.registry.redaction import redact, redact_files
from align.schema import Kind

_LIBRARIES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes"
)  # fmt: skip


@dataclass(frozen=True)
class Staging:
    """A folder that becomes a version when it is committed and is deleted when it is not."""

    path: Path
    """the folder to write into"""
    home: Path
    """the folder of the versions of its name"""
    root: Path
    disk: Disk = DISK

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, fields: dict[str, Any]) -> Checkpoint:
        """Make the folder's content durable and give it the next version of its name.

        `fields` are the manifest's: stage, kind, parents, base, data, metrics and so on. Name, version, digests, time
        and program versions are added here.
        """
        if fields.get("kind") not in get_args(Kind) or not fields.get("stage"):
            raise ValueError(f"a manifest needs stage and kind ({', '.join(get_args(Kind))}), got {sorted(fields)}")
        if reserved := {"format", "name", "version", "created", "commit_id", "git", "files", "seal"} & set(fields):
            raise ValueError(f"the registry fills {sorted(reserved)} itself")
        redact_files(self.path)
        return self._publish({"versions": dict(library_versions()), **redact(fields), **_stamp(self.home.name)})

    def adopt(self, manifest: dict[str, Any], digest: str, changes: dict[str, Any]) -> Checkpoint:
        """Commit a version of another registry: under its own number when that is free, else under the next.

        `digest` is that of its manifest there; `changes` replaces fields of it. With number, name and fields unchanged
        the manifest, and so the digest, stays what it was.
        """
        number = manifest["version"]
        removed = disk_layout.read_mark(self.home, number, "removed")
        is_free = self.home.name == manifest["name"] and number not in disk_layout.version_numbers(self.home)
        is_same = removed is None or removed["digest"] == digest
        fields = {key: value for key, value in manifest.items() if key not in ("files", "seal")}
        fields |= {**changes, "name": self.home.name}
        checkpoint = self._publish(fields, number if is_free and is_same else None)
        origin = f"as {manifest['name']}@v{number}"
        disk_layout.write_mark(self.home, checkpoint.version or 0, "imported", origin, digest, self.disk)
        return checkpoint

    def _publish(self, fields: dict[str, Any], number: int | None = None) -> Checkpoint:
        """Make everything durable and rename it to `number`, or the next when that is None or was taken meanwhile."""
        for path in durable.walk_files(self.path):
            if path.suffix in PICKLES:
                raise IntegrityError(
                    f"{path.relative_to(self.path)}: pickles and optimizer state never enter the registry; "
                    "save safetensors and JSON only"
                )
        if self.home.is_symlink():
            raise IntegrityError(f"{self.home}: is a link; versions are kept in real folders, replace it")
        durable.make_folder(self.home, self.root, self.disk)
        files = durable.sync_and_digest(self.path, MANIFEST, self.disk)
        if not files:
            raise IntegrityError(f"{self.home.name}: the folder to commit is empty; save the model there first")
        while True:
            version = number or disk_layout.last_number(self.home) + 1
            durable.write_seal(self.path, {**fields, "version": version}, files, MANIFEST, self.disk)
            target = self.home / disk_layout.version_folder(version)
            if durable.publish(self.path, target, MANIFEST, self.disk):
                with suppress(OSError):  # some file systems have no permissions to take away
                    durable.freeze(target)
                return read_version(target, self.home.name, version)
            number = None


def _stamp(name: str) -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit_id": uuid.uuid4().hex,
        "git": git_revision(),
    }


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Return the versions of this program, Python and the libraries that shape a result, importing none of them."""
    versions = {"align": align.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return MappingProxyType(versions)


@functools.cache
def git_revision() -> str | None:
    """Return the commit of this source tree, `-dirty` when files differ; None when align is installed."""
    tree = Path(align.__file__).resolve().parent.parent
    if not (tree / ".git").exists():
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # Without optional locks a commit made at the same moment is not disturbed.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
