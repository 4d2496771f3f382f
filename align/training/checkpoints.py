"""Checkpoints of a run: sealed after their last byte is on disk, rotated only then, verified before resuming.

Here too is the identity of a run: what a resumed one must share with the one that was saved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import StageConfig
from align.errors import IntegrityError, UsageError, nearest
from align.registry.durable import DISK, read_seal, seal, verify_seal
from align.registry.redaction import redact
from align.training.ranks import Ranks

if TYPE_CHECKING:
    pass

SEAL = "align_checkpoint.json"
KEPT_CHECKPOINTS = 2
LOG = "metrics.jsonl"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
_FREE = {"logging_steps", "save_steps", "report_to", "dataset_num_proc", "gold"}
"""settings that change what is reported and not what is trained"""
_FIXED = ("stage", "name", "model", "lora.r", "lora.target_modules", "lora.use_dora", "peft", "adapter")
"""settings that decide the shape of the saved tensors, so that no continuation can change them"""


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
        self.best: int | None = None
        """the step whose checkpoint is kept whatever comes after it"""
        self.torn: list[str] = []
        """the new names of the damaged checkpoints that `newest` set aside"""
        self.changes: list[str] = []
        """the allowed differences from the run that `newest` resumes"""

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a new folder on rank 0, and seal it."""
        path = self.folder / f"checkpoint-{step}"

        def fill() -> None:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            write(path)

        self.ranks.from_rank_zero(fill)
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
        DISK.sync_folder(self.folder)
        for old, path in self._list()[:-KEPT_CHECKPOINTS]:
            if old < step and old != self.best:
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
                saved = read_seal(path, SEAL)["fingerprint"]
                now = json.loads(json.dumps(self._fingerprint()))
                what = f"--resume {path}: this is not the run that was saved"
                self.changes = refuse_changes(what, saved, now, self.continuation.allow_change)
                return step, path
            names = (f"{path.name}.torn" + (f"-{number}" if number > 1 else "") for number in count(1))
            free = next(target for name in names if not (target := path.with_name(name)).exists())
            path.rename(free)
            self.torn.append(free.name)
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

    def drop_unsealed(self) -> None:
        """Remove the checkpoint that was being written when the run failed."""
        for _, path in self._list() if self.ranks.is_rank_zero else ():
            if not (path / SEAL).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def _list(self) -> list[tuple[int, Path]]:
        matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(match[1]), path) for match, path in matches if match)


def identifying_settings(config: StageConfig) -> dict[str, Any]:
    """Return the settings that identify a run, as JSON values without access tokens: they are written to disk."""
    return redact({key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE})


def package_versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on."""
    return {package: version(package) for package in _PACKAGES}


def refuse_changes(what: str, before: dict[str, Any], now: dict[str, Any], allowed: Iterable[str]) -> list[str]:
    """Return the allowed differences of two identities, one line each; raise IntegrityError for any other."""
    old, new = _flatten(before), _flatten(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if not is_same(old.get(key), new.get(key))]
    changed = {key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys}
    refused = [key for key in changed if not _covers(allowed, key)]
    if not refused:
        return list(changed.values())
    settings = ",".join(sorted({key.partition("[")[0] for key in refused}))
    fixed = any(_covers(_FIXED, key) for key in refused)
    raise IntegrityError(
        f"{what} ({'; '.join(changed[key] for key in refused)}); restore those settings"
        f"{'' if fixed else f', allow it with --allow-change {settings}'}, or start a new run without --resume"
    )


def is_same(before: Any, now: Any) -> bool:
    """Return whether a setting is unchanged; an empty mapping is the same as no setting."""
    return (before if before != {} else None) == (now if now != {} else None)


def check_allowed(allowed: Iterable[str], identity: dict[str, Any]) -> None:
    """Raise UsageError for a field that no identity has or that decides the shape of the saved tensors."""
    parts = (key.split(".") for key in _flatten(identity))
    names = {"data", *(".".join(part[:length]) for part in parts for length in range(1, len(part) + 1))}
    for field in allowed:
        if field not in names:
            raise UsageError(f"--allow-change {field}: no such setting;{nearest(field, sorted(names))}")
        if any(_covers([field], fixed) or _covers([fixed], field) for fixed in _FIXED):
            raise UsageError(
                f"--allow-change {field}: what was saved depends on it and cannot be loaded otherwise; "
                "start a new run without --resume"
            )


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _covers(fields: Iterable[str], key: str) -> bool:
    """Return whether a key is one of some fields or a part of one."""
    return any(key == field or key.startswith((field + ".", field + "[")) for field in fields)
