"""Checkpoints of a run: sealed after their last byte is on disk, rotated only then, verified before resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import IntegrityError
from align.registry.durable import fsync_folder, read_seal, seal, verify_seal
from align.training.identity import refuse_changes
from align.training.ranks import Ranks

SEAL = "align_checkpoint.json"
KEPT_CHECKPOINTS = 2
LOG = "metrics.jsonl"


@dataclass(frozen=True)
class Continuation:
    """The request to resume a run, and the settings in which it may differ from the one that was saved."""

    resume: bool = False
    allow_change: tuple[str, ...] = ()


class Checkpoints:
    """The `checkpoint-N` folders of one run; `fingerprint` is what a resumed run must share with the one that saved."""

    def __init__(
        self, folder: Path, fingerprint: Callable[[], dict[str, Any]], ranks: Ranks, continuation: Continuation
    ) -> None:
        self.folder, self._fingerprint, self.ranks, self.continuation = folder, fingerprint, ranks, continuation
        self._best: int | None = None
        self.torn: list[str] = []
        """the new names of the damaged checkpoints that `newest` set aside"""
        self.changes: list[str] = []
        """the allowed differences from the run that `newest` resumes"""

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a new folder on rank 0, and seal it."""
        path = self.folder / f"checkpoint-{step}"
        self.ranks.from_rank_zero(lambda: _fill(path, write))
        self.seal(step)
        return path

    def seal(self, step: int, progress: dict[str, Any] | None = None) -> None:
        """Make a written folder durable, which makes it a checkpoint, and drop the oldest beyond the last two.

        `progress` is kept with it and comes back from `progress_of`. Rank 0 does it once all ranks have written.
        """
        self.ranks.wait_for_everyone()
        self.ranks.from_rank_zero(lambda: self._seal(step, progress))

    def _seal(self, step: int, progress: dict[str, Any] | None) -> None:
        if (log := self.folder / LOG).is_file():
            with log.open("rb+") as file:
                # A resumed run keeps the log up to here, so it must not be younger than the checkpoint.
                os.fsync(file.fileno())
        # A pickle of every setting, access tokens included, that resuming never reads.
        (self.folder / f"checkpoint-{step}" / "training_args.bin").unlink(missing_ok=True)
        fields = {"step": step, "fingerprint": self._fingerprint(), "progress": json.dumps(progress or {})}
        seal(self.folder / f"checkpoint-{step}", fields, SEAL)
        fsync_folder(self.folder)
        for old, path in self._list()[:-KEPT_CHECKPOINTS]:
            if old < step and old != self._best:
                shutil.rmtree(path)

    def newest(self) -> tuple[int, Path] | None:
        """Return step and path of the newest checkpoint that verifies; torn ones are renamed `checkpoint-N.torn`.

        None when there is none, or the run was not asked to resume. Raises IntegrityError when the run is not the one
        that was saved, or when there are checkpoints and none verifies.
        """
        if not self.continuation.resume:
            return None
        for step, path in reversed(self._list()):
            if not verify_seal(path, SEAL):
                self._compare(path)
                return step, path
            self.torn.append(_set_aside(path))
        torn = self.torn or sorted(path.name for path in self.folder.glob("checkpoint-*.torn*"))
        if torn:
            raise IntegrityError(
                f"--resume {self.folder}: no checkpoint is whole ({', '.join(torn)} were set aside); "
                "start a new run without --resume"
            )
        return None

    def progress_of(self, path: Path) -> dict[str, Any]:
        """Return the progress that was sealed with a checkpoint."""
        progress: dict[str, Any] = json.loads(read_seal(path, SEAL)["progress"])
        return progress

    def path_of(self, step: int) -> Path:
        """Return the checkpoint of a step; raises IntegrityError when it is gone or damaged."""
        path = self.folder / f"checkpoint-{step}"
        if problems := verify_seal(path, SEAL):
            raise IntegrityError(f"{path}: is needed and not whole ({problems[0]}); start a new run without --resume")
        return path

    def list_sealed(self) -> list[str]:
        """Return the names of the sealed checkpoints, oldest first; their content is not read."""
        return [path.name for _, path in self._list() if (path / SEAL).is_file()]

    def keep_best(self, step: int | None) -> None:
        """Keep the checkpoint of a step whatever comes after it, in place of the one kept so far."""
        self._best = step

    def drop_unsealed(self) -> None:
        """Remove the checkpoint that was being written when the run failed."""
        if not self.ranks.is_rank_zero:
            return
        for _, path in self._list():
            if not (path / SEAL).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def _compare(self, path: Path) -> None:
        saved = read_seal(path, SEAL)["fingerprint"]
        now = json.loads(json.dumps(self._fingerprint()))
        what = f"--resume {path}: this is not the run that was saved"
        self.changes = refuse_changes(what, saved, now, self.continuation.allow_change)

    def _list(self) -> list[tuple[int, Path]]:
        matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(match[1]), path) for match, path in matches if match)


def _fill(path: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    write(path)


def _set_aside(path: Path) -> str:
    """Rename a torn checkpoint to a free name, and return it."""
    target, count = path.with_name(path.name + ".torn"), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.torn-{count}")
    path.rename(target)
    return target.name
