"""The folder of a run: made anew or found again, held against other processes, stopped by SIGTERM."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, dump_yaml
from align.errors import IntegrityError, MachineError
from align.training.checkpoints import SEAL, difference
from align.training.run import Run

if TYPE_CHECKING:
    from align.registry import Registry
    from align.training.stage import Stage

STARTED, FINISHED = "run.json", "finished.json"
_FULL = 64 * 1024
"""bytes; with less than this nothing a run writes fits"""


@contextmanager
def open_run(
    stage: Stage, config: StageConfig, registry: Registry, *, resume: bool, allow_change: tuple[str, ...] = ()
) -> Iterator[Run]:
    """Open a new run folder, or with `resume` the one to go on with, and hold it against other processes.

    SIGTERM sets `run.stopping`; a stage then saves a checkpoint and raises PreemptedError. A run that ends before it
    has logged anything leaves no folder behind.
    """
    runs = registry.runs_dir(config.name)
    folder = (_unfinished(runs) if resume else None) or _new_folder(runs)
    run = Run(stage, config, registry, folder, resume=resume)
    run.allow_change = allow_change
    with _locked(folder), _on_sigterm(run):
        try:
            _start(run)
            yield run
        except BaseException as error:
            full = _full_disk(folder, error)
            if not _holds_work(folder):
                shutil.rmtree(folder, ignore_errors=True)
            if full is not None:
                raise full from None
            raise


def _full_disk(folder: Path, error: BaseException) -> MachineError | None:
    """The error to raise when another is the disk's: torch reports a full one as a RuntimeError about its stream."""
    free = shutil.disk_usage(folder).free
    if not isinstance(error, OSError | RuntimeError):
        return None
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and free > _FULL:
        return None
    kept = sorted(path.parent.name for path in folder.glob(f"checkpoint-*/{SEAL}"))
    return MachineError(
        f"{folder}: the disk is full, {free:,} bytes are free; whole checkpoints: {', '.join(kept) or 'none'}; "
        "free space and go on with the same command and --resume"
    )


def _start(run: Run) -> None:
    """Refuse to go on with a run that was started otherwise; only then write what this one is."""
    identity = json.loads(json.dumps(run.identity()))
    path = run.folder / STARTED
    if path.is_file():
        changed = difference(json.loads(path.read_text(encoding="utf-8")), identity)
        if changed:
            raise IntegrityError(
                f"--resume {run.folder}: this is not the run that was started ({changed}); "
                "restore those settings, or start a new run without --resume"
            )
    if run.finished is None:
        path.write_text(json.dumps(identity), encoding="utf-8")
        (run.folder / "config.yaml").write_text(dump_yaml(run.config), encoding="utf-8")
        _seed(run.config.seed)


def _new_folder(runs: Path) -> Path:
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


def _unfinished(runs: Path) -> Path | None:
    """The newest run with a checkpoint, else the newest; a finished one newer than both ends the search.

    None when there is no run yet, so that `--resume` is safe in a job that is queued again.
    """
    found = sorted((path for path in runs.glob("*") if (path / STARTED).is_file()), reverse=True)
    newest = found[0] if found else None
    for folder in found:
        if (folder / FINISHED).is_file():
            return folder if folder == newest else newest
        if any(folder.glob("checkpoint-*")):
            return folder
    return newest


def _holds_work(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or any(folder.glob("checkpoint-*"))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise IntegrityError(
                f"{folder}: another process is running in it; wait for it to end, or start a new run without --resume"
            ) from None
        yield


@contextmanager
def _on_sigterm(run: Run) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: Any) -> None:
        run.stopping = True

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)
