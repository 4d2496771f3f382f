"""A run of a stage: what a stage function gets besides its settings, and its folder, locked against other processes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from align.config import StageConfig, dump_yaml
from align.errors import IntegrityError, MachineError
from align.models.adapters import digests_of_base
from align.registry import Checkpoint, Registry
from align.registry.durable import write_durably
from align.registry.redaction import redact_lines
from align.training.checkpoints import (
    LOG,
    Checkpoints,
    Continuation,
    check_allowed,
    identifying_settings,
    is_same,
    package_versions,
    refuse_changes,
)  # fmt: skip
from align.training.endings import explain_shortage, handle_signals
from align.training.ranks import Ranks, join_ranks
from align.training.run_log import RunLog, print_line
from align.training.stage import Stage
from align.training.training_data import TrainingData
from align.training.trl_bridge import explain_passthrough

STARTED, FINISHED = "run.json", "finished.json"


class Run:
    """A run with its folder, data, log and checkpoints; made by `open_run`."""

    def __init__(
        self, stage: Stage, config: StageConfig, registry: Registry, folder: Path, ranks: Ranks, resuming: Continuation
    ) -> None:
        self.stage, self.config, self.registry, self.folder, self.ranks = stage, config, registry, folder, ranks
        self.data = TrainingData(stage, config, registry, ranks, self.print_line)
        self.checkpoints = Checkpoints(folder, self.fingerprint, ranks, resuming)
        self.log = RunLog(stage.name, config, folder, self.checkpoints)
        self.stopped_by: int | None = None
        """the signal that asked the run to stop"""
        self.registered: str | None = None
        """the reference of the version once it is in the registry: the run has ended well, whatever follows"""

    @property
    def stopping(self) -> bool:
        """True when the run was asked to stop at its next safe point."""
        return self.stopped_by is not None

    @cached_property
    def parent(self) -> Checkpoint:
        """The checkpoint `model` refers to."""
        return self.registry.resolve(self.config.model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Stage, settings, versions and resolved references: what identifies the run before it has read its data."""
        identity = {"stage": self.stage.name} | identifying_settings(self.config)
        for key, reference in self.config.references.items():
            checkpoint = self.registry.resolve(reference)
            base = self.registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
            identity[key] = {
                "reference": checkpoint.reference,
                "digest": checkpoint.digest,
                "base": digests_of_base(base, self.registry) if not base.is_hub else base.reference,
            }
        identity |= {"world_size": self.ranks.world_size, "versions": package_versions()}
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def fingerprint(self) -> dict[str, Any]:
        """Return what a run and its continuation must share: its identity and the data it has read."""
        return self.identity | self.data.fingerprint()

    def print_line(self, text: str) -> None:
        """Print a line for the user on rank 0."""
        if self.ranks.is_rank_zero:
            print_line(text)

    def start(self) -> str | None:
        """Write identity and settings into the folder, or return the reference that the finished run has registered.

        Raises IntegrityError, before anything is written, when the run was started with other settings. Rank 0 does it.
        """
        allowed = self.checkpoints.continuation.allow_change
        check_allowed(allowed, self.identity)
        path = self.folder / STARTED
        if path.is_file():
            what = f"--resume {self.folder}: this is not the run that was started"
            refuse_changes(what, json.loads(path.read_text(encoding="utf-8")), self.identity, allowed)
            if (self.folder / FINISHED).is_file():
                return str(json.loads((self.folder / FINISHED).read_text(encoding="utf-8"))["reference"])
            for version in reversed(self.registry.versions(self.config.name)):
                if (version.manifest or {}).get("run") == self.folder.name:
                    self.finish(version.reference)  # it was killed before it could write so
                    return version.reference
        write_durably(path, json.dumps(self.identity).encode())
        write_durably(self.folder / "config.yaml", redact_lines(dump_yaml(self.config)).encode())
        return None

    def resume_point(self) -> tuple[int, Path] | None:
        """Return the step and checkpoint to resume from, or None; what was logged after that step is dropped."""
        checkpoints = self.checkpoints
        point = self.ranks.from_rank_zero(checkpoints.newest)
        self.log.forget_after(point[0] if point is not None else 0)
        for torn in checkpoints.torn:
            self.print_line(f"checkpoint set aside as {torn}: it is incomplete or damaged")
        for change in checkpoints.changes:
            self.print_line(f"allowed to differ: {change}")
        if point is not None:
            self.print_line(f"{'going back to and ' if checkpoints.torn else ''}resuming from step {point[0]}")
        elif checkpoints.continuation.resume:
            self.print_line("no checkpoint yet; starting at step 0")
        return point

    def finish(self, reference: str) -> None:
        """Write into the folder that the run is complete."""
        write_durably(self.folder / FINISHED, json.dumps({"reference": reference}).encode())


@contextmanager
def open_run(
    stage: Stage, config: StageConfig, registry: Registry, *, resume: bool, allow_change: tuple[str, ...] = ()
) -> Iterator[Run]:
    """Open a new run folder, or with `resume` the one to go on with, and lock it against other processes.

    SIGTERM and Ctrl-C set `run.stopping`; a stage then saves a checkpoint and raises PreemptedError. Without disk or
    memory it ends with a MachineError. A run that ends before it has logged anything leaves no folder behind.
    """
    ranks = join_ranks()
    runs = registry.runs_dir(config.name)
    folder = ranks.from_rank_zero(lambda: (_find_unfinished(runs, config) if resume else None) or _make_folder(runs))
    run = Run(stage, config, registry, folder, ranks, Continuation(resume, allow_change))
    with ExitStack() as stack:
        ranks.from_rank_zero(lambda: _lock(folder, stack))  # rank 0 holds it for all ranks of a run
        stack.enter_context(handle_signals(run))
        try:
            with explain_shortage(run), explain_passthrough(config):
                yield run
        except BaseException:
            has_work = (folder / LOG).is_file() or any(folder.glob("checkpoint-*"))
            if ranks.is_rank_zero and not has_work:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            run.log.close(ended_well=run.registered is not None)


def _make_folder(runs: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = runs / (stamp if attempt == 0 else f"{stamp}-{attempt:03}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise MachineError(f"{folder}: cannot be made ({error.strerror}); choose another --registry") from None
        return folder
    raise MachineError(f"{runs}: a thousand runs started this second; wait a second")


def _find_unfinished(runs: Path, config: StageConfig) -> Path | None:
    """Return the run to go on with: one that was started with these settings, else any, which is then refused.

    None when there is no run yet, so that `--resume` is safe in a job that is queued again.
    """
    folders = sorted((path for path in runs.glob("*") if (path / STARTED).is_file()), reverse=True)
    return _select_folder([path for path in folders if _has_settings(path, config)]) or _select_folder(folders)


def _has_settings(folder: Path, config: StageConfig) -> bool:
    """Return whether a run was started with these settings, apart from what its references stand for."""
    try:
        saved = json.loads((folder / STARTED).read_text(encoding="utf-8"))
    except ValueError:
        return False
    settings = identifying_settings(config).items()
    return all(is_same(saved.get(key), value) for key, value in settings if key not in config.references)


def _select_folder(folders: list[Path]) -> Path | None:
    """Return, of runs newest first, the newest with a checkpoint, else the newest; a finished one ends the search."""
    for folder in folders:
        if (folder / FINISHED).is_file():
            break
        if any(folder.glob("checkpoint-*")):
            return folder
    return folders[0] if folders else None


def _lock(folder: Path, stack: ExitStack) -> None:
    # Opened for appending, so that a process that does not get the lock leaves the holder's name in the file.
    file = stack.enter_context((folder / "lock").open("a+", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise IntegrityError(
            f"{folder}: {holder} is running in it; wait for it to end, stop it, or start a new run without --resume"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
