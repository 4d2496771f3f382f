"""The folder of a run: a new one or the one to resume, locked against other processes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from align.config import StageConfig
from align.errors import IntegrityError, MachineError
from align.training.checkpoints import LOG, Continuation
from align.training.identity import identifying_settings, is_same
from align.training.ranks import Ranks, join_ranks
from align.training.run import FINISHED, STARTED, Run
from align.training.shortage import explain_shortage
from align.training.stops import handle_signals
from align.training.trl_bridge import explain_passthrough

if TYPE_CHECKING:
    from align.registry import Registry
    from align.training.stage import Stage


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
    with (
        _locked(folder, ranks), handle_signals(run), _removed_when_empty(run), explain_shortage(run),
        explain_passthrough(config),
    ):  # fmt: skip
        yield run


@contextmanager
def _removed_when_empty(run: Run) -> Iterator[None]:
    """Remove the folder of a run that failed before it had logged or saved anything, and close the log."""
    try:
        yield
    except BaseException:
        has_work = (run.folder / LOG).is_file() or any(run.folder.glob("checkpoint-*"))
        if run.ranks.is_rank_zero and not has_work:
            shutil.rmtree(run.folder, ignore_errors=True)
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


@contextmanager
def _locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a folder; rank 0 holds it for all ranks of a run."""
    with ExitStack() as stack:
        ranks.from_rank_zero(lambda: _lock(folder, stack))
        yield


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
