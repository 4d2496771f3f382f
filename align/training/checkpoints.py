"""Checkpoints inside a run: sealed after their last byte is on disk, rotated only then, verified before resuming."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import IntegrityError
from align.registry.durable import fsync_folder, seal, verify_seal

SEAL = "align_checkpoint.json"
KEEP = 2


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The fields in which two fingerprints differ, as text; empty when they do not."""
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys)


class Checkpoints:
    """The `checkpoint-N` folders of one run.

    `fingerprint` is what a resumed run must share with the one that saved: settings, data, parent and versions.
    """

    def __init__(self, folder: Path, fingerprint: Callable[[], dict[str, Any]], *, resume: bool) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self.resume = resume
        self.torn: list[str] = []
        """the checkpoints that `newest` found damaged, by their new names"""

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a new folder, seal it and drop the oldest beyond the last two."""
        path = self.folder / f"checkpoint-{step}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        write(path)
        self.seal(step)
        return path

    def seal(self, step: int) -> None:
        """Make a written folder durable and rotate; only from here on can it be resumed from."""
        fields = {"step": step, "fingerprint": self._fingerprint()}
        seal(self.folder / f"checkpoint-{step}", fields, SEAL)
        fsync_folder(self.folder)
        for old, path in self._found()[:-KEEP]:
            if old < step:
                shutil.rmtree(path)

    def newest(self) -> tuple[int, Path] | None:
        """The newest checkpoint that verifies, or None; torn ones are renamed `checkpoint-N.torn`.

        None unless the run was asked to resume. Raises IntegrityError when the run asked for now is not the run that
        was saved, or when there are checkpoints and none verifies.
        """
        if not self.resume:
            return None
        for step, path in reversed(self._found()):
            problems = verify_seal(path, SEAL)
            if not problems:
                self._compare(path)
                return step, path
            self.torn.append(path.name + ".torn")
            path.rename(path.with_name(self.torn[-1]))
        if self.torn:
            raise IntegrityError(
                f"--resume {self.folder}: no checkpoint is whole ({', '.join(self.torn)} were set aside); "
                "start a new run without --resume"
            )
        return None

    def _compare(self, path: Path) -> None:
        import json

        saved = json.loads((path / SEAL).read_text(encoding="utf-8"))["fingerprint"]
        now = json.loads(json.dumps(self._fingerprint()))
        changed = difference(saved, now)
        if changed:
            raise IntegrityError(
                f"--resume {path}: this is not the run that was saved ({changed}); "
                "restore those settings, or start a new run without --resume"
            )

    def _found(self) -> list[tuple[int, Path]]:
        matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(match[1]), path) for match, path in matches if match)
