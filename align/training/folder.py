"""The folder of a run: made anew or found again, held against other processes, stopped by SIGTERM."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from align.config import StageConfig, dump_yaml
from align.errors import IntegrityError, MachineError
from align.registry.durable import write_durably
from align.registry.redaction import redact_lines
from align.training.checkpoints import check_allowed, refuse_changes
from align.training.run import Run
from align.training.shortage import explain_shortage
from align.training.stops import heed_signals

if TYPE_CHECKING:
    from align.registry import Registry
    from align.training.stage import Stage

STARTED, FINISHED = "run.json", "finished.json"


@contextmanager
def open_run(
    stage: Stage, config: StageConfig, registry: Registry, *, resume: bool, allow_change: tuple[str, ...] = ()
) -> Iterator[Run]:
    """Open a new run folder, or with `resume` the one to go on with, and hold it against other processes.

    SIGTERM and Ctrl-C set `run.stopping`; a stage then saves a checkpoint and raises PreemptedError. Without disk or
    memory it ends with a MachineError. A run that ends before it has logged anything leaves no folder behind.
    """
    runs = registry.runs_dir(config.name)
    folder = (_unfinished(runs) if resume else None) or _new_folder(runs)
    run = Run(stage, config, registry, folder, resume=resume)
    run.checkpoints.allow_change = allow_change
    with _locked(folder), heed_signals(run), _tidied(run), explain_shortage(run):
        _start(run)
        yield run


@contextmanager
def _tidied(run: Run) -> Iterator[None]:
    """Leave no folder of a run that failed before it had logged anything, and no open file of one that did not."""
    try:
        yield
    except BaseException:
        if not _holds_work(run.folder):
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    finally:
        run.close()


def _start(run: Run) -> None:
    """Refuse to go on with a run that was started otherwise; only then write what this one is."""
    identity = json.loads(json.dumps(run.identity()))
    allowed = run.checkpoints.allow_change
    check_allowed(allowed, identity)
    path = run.folder / STARTED
    resuming = path.is_file()
    if resuming:
        what = f"--resume {run.folder}: this is not the run that was started"
        refuse_changes(what, json.loads(path.read_text(encoding="utf-8")), identity, allowed)
    if resuming and run.finished is None:
        _notice_registered(run)
    if run.finished is None:
        write_durably(path, json.dumps(identity).encode())
        write_durably(run.folder / "config.yaml", redact_lines(dump_yaml(run.config)).encode())
        _seed(run.config.seed)
        _hide_bars()


def _notice_registered(run: Run) -> None:
    """Mark a run as complete that ended between registering its version and saying so."""
    for version in reversed(run.registry.versions(run.config.name)):
        if (version.manifest or {}).get("run") == run.folder.name:
            run.finish(version.reference)
            return


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
    # Opened for appending: whoever asks in vain must not wipe out who holds it.
    with (folder / "lock").open("a+", encoding="utf-8") as file:
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
        yield


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _hide_bars() -> None:
    """Keep the libraries' bars (tokenising, writing shards) out of the run's own progress."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
