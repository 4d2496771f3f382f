"""Checkpoints inside a run: sealed after their last byte is on disk, rotated only then, verified before resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from align.errors import IntegrityError, UsageError, nearest
from align.registry.durable import fsync_folder, read_seal, seal, verify_seal
from align.training.ranks import Ranks

SEAL = "align_checkpoint.json"
KEEP = 2
LOG = "metrics.jsonl"

# The saved tensors have the shape these give them, so no continuation can have them otherwise.
FIXED = ("stage", "name", "model", "lora.r", "lora.target_modules", "lora.use_dora", "adapter")


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The fields in which two fingerprints differ, each with what it was and is; groups are named `group.field`."""
    old, new = flatten(before), flatten(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return {key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys}


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def refuse_changes(what: str, before: dict[str, Any], now: dict[str, Any], allowed: Iterable[str]) -> list[str]:
    """Raise IntegrityError when two fingerprints differ in a field that is not allowed to; returns the allowed ones."""
    changed = changed_fields(before, now)
    refused = [key for key in changed if not _permits(allowed, key)]
    if not refused:
        return list(changed.values())
    loose = sorted({key.partition("[")[0] for key in refused})
    let = "" if any(_permits(FIXED, key) for key in refused) else f", allow it with --allow-change {','.join(loose)}"
    raise IntegrityError(
        f"{what} ({'; '.join(changed[key] for key in refused)}); "
        f"restore those settings{let}, or start a new run without --resume"
    )


def check_allowed(allowed: Iterable[str], fingerprint: dict[str, Any]) -> None:
    """Raise UsageError for a field that no fingerprint has or that shapes the saved tensors."""
    known = {"data", *(part for key in flatten(fingerprint) for part in _with_groups(key))}
    for field in allowed:
        if field not in known:
            raise UsageError(f"--allow-change {field}: no such setting;{nearest(field, sorted(known))}")
        if any(_permits([field], fixed) or _permits([fixed], field) for fixed in FIXED):
            raise UsageError(
                f"--allow-change {field}: what was saved depends on it and cannot be loaded otherwise; "
                "start a new run without --resume"
            )


def _with_groups(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _permits(allowed: Iterable[str], key: str) -> bool:
    return any(key == field or key.startswith((field + ".", field + "[")) for field in allowed)


class Checkpoints:
    """The `checkpoint-N` folders of one run.

    `fingerprint` is what a resumed run must share with the one that saved: settings, data, parent and versions, apart
    from the fields in `allow_change`.
    """

    def __init__(self, folder: Path, fingerprint: Callable[[], dict[str, Any]], *, resume: bool) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self.resume = resume
        self.allow_change: tuple[str, ...] = ()
        self.read_old: Callable[[dict[str, Any]], dict[str, Any]] = dict
        """a fingerprint that an earlier version of the program saved, in the words of this one"""
        self.ranks = Ranks()
        self.best: int | None = None
        """a step whose checkpoint is kept whatever comes after it"""
        self.torn: list[str] = []
        """the checkpoints that `newest` found damaged, by their new names"""
        self.changes: list[str] = []
        """what differs, with leave, from the run that `newest` goes on with"""

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a new folder, seal it and drop the oldest beyond the last two; of several processes the
        first does it all.
        """
        path = self.folder / f"checkpoint-{step}"
        self.ranks.share(lambda: _fill(path, write))
        self.seal(step)
        return path

    def seal(self, step: int, progress: dict[str, Any] | None = None) -> None:
        """Make a written folder durable and rotate; only from here on can it be resumed from.

        `progress` is kept with it and comes back from `progress_of`. Of several processes the first does it, once all
        have written their part.
        """
        self.ranks.wait()
        self.ranks.share(lambda: self._seal(step, progress))

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
        for old, path in self._found()[:-KEEP]:
            if old < step and old != self.best:
                shutil.rmtree(path)

    def newest(self) -> tuple[int, Path] | None:
        """The newest checkpoint that verifies, or None; torn ones are renamed `checkpoint-N.torn`.

        None unless the run was asked to resume. Raises IntegrityError when the run asked for now is not the run that
        was saved, or when there are checkpoints and none verifies.
        """
        if not self.resume:
            return None
        for step, path in reversed(self._found()):
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
        """What was kept with a checkpoint when it was sealed."""
        kept: dict[str, Any] = json.loads(read_seal(path, SEAL)["progress"])
        return kept

    def path_of(self, step: int) -> Path:
        """The whole checkpoint of a step; IntegrityError when it is gone or damaged."""
        path = self.folder / f"checkpoint-{step}"
        if problems := verify_seal(path, SEAL):
            raise IntegrityError(f"{path}: is needed and not whole ({problems[0]}); start a new run without --resume")
        return path

    def whole(self) -> list[str]:
        """The names of the sealed checkpoints, oldest first; their content is not read."""
        return [path.name for _, path in self._found() if (path / SEAL).is_file()]

    def drop_unsealed(self) -> None:
        """Remove what was being written when the run failed; it can never be resumed from."""
        if not self.ranks.first:
            return
        for _, path in self._found():
            if not (path / SEAL).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def _compare(self, path: Path) -> None:
        saved = self.read_old(read_seal(path, SEAL)["fingerprint"])
        now = json.loads(json.dumps(self._fingerprint()))
        what = f"--resume {path}: this is not the run that was saved"
        self.changes = refuse_changes(what, saved, now, self.allow_change)

    def _found(self) -> list[tuple[int, Path]]:
        matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(match[1]), path) for match, path in matches if match)


def _fill(path: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    write(path)


def _set_aside(path: Path) -> str:
    """Give a torn checkpoint a name that is free, and return it."""
    target, count = path.with_name(path.name + ".torn"), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.torn-{count}")
    path.rename(target)
    return target.name
