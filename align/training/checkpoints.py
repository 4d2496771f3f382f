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


class Checkpoints:
    """The `checkpoint-N` folders of one run.

    `fingerprint` is what a resumed run must share with the one that saved: settings, data, parent and versions.
    """

    def __init__(self, folder: Path, fingerprint: Callable[[], dict[str, Any]], *, resume: bool) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._resume = resume

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

        None unless the run was asked to resume. Raises IntegrityError, with a diff, when the run asked for now is not
        the run that was saved.
        """
        if not self._resume:
            return None
        for step, path in reversed(self._found()):
            problems = verify_seal(path, SEAL)
            if not problems:
                self._compare(path)
                return step, path
            path.rename(path.with_name(path.name + ".torn"))
        return None

    def _compare(self, path: Path) -> None:
        import json

        saved = json.loads((path / SEAL).read_text(encoding="utf-8"))["fingerprint"]
        now = json.loads(json.dumps(self._fingerprint()))
        changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
        if changed:
            diff = "; ".join(f"{key} was {saved.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise IntegrityError(
                f"--resume {path}: this is not the run that was saved ({diff}); "
                "restore those settings, or start a new run without --resume"
            )

    def _found(self) -> list[tuple[int, Path]]:
        matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(match[1]), path) for match, path in matches if match)
