"""Committing: how a folder of files becomes an immutable version, whatever happens meanwhile."""

from __future__ import annotations

import shutil
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from align.errors import IntegrityError
from align.registry import durable, layout, provenance
from align.registry.checkpoint import MANIFEST, MANIFEST_FORMAT, Checkpoint, read_version
from align.registry.durable import DISK, Disk
from align.registry.foreign import PICKLES
from align.registry.redaction import redact, redact_files
from align.schema import Kind


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
        redact_files(self.path)
        whole = {"versions": dict(provenance.library_versions()), **redact(fields), **_stamp(self._home.name)}
        return self._publish(whole)

    def adopt(self, manifest: dict[str, Any], digest: str, changes: dict[str, Any]) -> Checkpoint:
        """Commit a version that another registry made: under its own number when that is free, else under the next.

        `digest` is that of its manifest as it was; `changes` replaces fields of it. With neither number, name nor
        fields changed the manifest, and so the digest, stays what it was.
        """
        number = manifest["version"]
        removed = layout.read_mark(self._home, number, "removed")
        keeps = self._home.name == manifest["name"] and number not in layout.version_numbers(self._home)
        same = removed is None or removed["digest"] == digest
        fields = {key: value for key, value in manifest.items() if key not in ("files", "seal")}
        found = self._publish({**fields, **changes, "name": self._home.name}, number if keeps and same else None)
        mark = layout.mark_path(self._home, found.version or 0, "imported")
        durable.write_durably(mark, layout.mark_text(f"as {manifest['name']}@v{number}", digest), self._disk)
        return found

    def _publish(self, fields: dict[str, Any], number: int | None = None) -> Checkpoint:
        """Make everything durable and rename it to `number`, or the next when that is None or taken meanwhile."""
        _refuse_pickles(self.path)
        if self._home.is_symlink():
            raise IntegrityError(f"{self._home}: is a link; versions are kept in real folders, replace it")
        durable.make_folder(self._home, self._root, self._disk)
        files = durable.measure(self.path, MANIFEST, self._disk)
        if not files:
            raise IntegrityError(f"{self._home.name}: the folder to commit is empty; save the model there first")
        while True:
            version = number or layout.last_number(self._home) + 1
            durable.write_seal(self.path, {**fields, "version": version}, files, MANIFEST, self._disk)
            target = self._home / layout.version_folder(version)
            if durable.publish(self.path, target, MANIFEST, self._disk):
                with suppress(OSError):  # the version is there; some file systems have no permissions to take away
                    durable.freeze(target)
                return read_version(target, self._home.name, version)
            number = None


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
        if path.suffix in PICKLES:
            name = path.relative_to(folder)
            raise IntegrityError(
                f"{name}: pickles and optimizer state never enter the registry; save safetensors and JSON only"
            )
