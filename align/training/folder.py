"""The folder of a run: made anew or found again, held against other processes, stopped by SIGTERM."""

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

from align.config import StageConfig, dump_yaml
from align.errors import IntegrityError, MachineError
from align.registry.durable import write_durably
from align.registry.redaction import redact_lines
from align.training.arguments import explain_passthrough
from align.training.checkpoints import check_allowed, refuse_changes
from align.training.ranks import join_ranks
from align.training.run import Run, settings_of
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
    ranks = join_ranks()
    runs = registry.runs_dir(config.name)
    folder = ranks.share(lambda: (_to_go_on_with(runs, config) if resume else None) or _new_folder(runs))
    run = Run(stage, config, registry, folder, resume=resume)
    run.ranks, run.checkpoints.ranks = ranks, ranks
    run.checkpoints.allow_change = allow_change
    with _locked(run), heed_signals(run), _tidied(run), explain_shortage(run), explain_passthrough(config):
        run.finished = ranks.share(lambda: _start(run))
        yield run


@contextmanager
def _tidied(run: Run) -> Iterator[None]:
    """Leave no folder of a run that failed before it had logged anything, and no open file of one that did not."""
    try:
        yield
    except BaseException:
        if run.ranks.first and not _holds_work(run.folder):
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    finally:
        run.close()


def _start(run: Run) -> str | None:
    """Refuse to go on with a run that was started otherwise; only then write what this one is.

    Returns the reference that a finished run has registered.
    """
    identity = json.loads(json.dumps(run.identity()))
    allowed = run.checkpoints.allow_change
    check_allowed(allowed, identity)
    path = run.folder / STARTED
    if path.is_file():
        what = f"--resume {run.folder}: this is not the run that was started"
        refuse_changes(what, run.read_old(json.loads(path.read_text(encoding="utf-8"))), identity, allowed)
        if (registered := _registered(run)) is not None:
            return registered
    write_durably(path, json.dumps(identity).encode())
    write_durably(run.folder / "config.yaml", redact_lines(dump_yaml(run.config)).encode())
    return None


def _registered(run: Run) -> str | None:
    """The reference that a run has registered, also when it ended before it could say so."""
    path = run.folder / FINISHED
    if path.is_file():
        reference: str = json.loads(path.read_text(encoding="utf-8"))["reference"]
        return reference
    for version in reversed(run.registry.versions(run.config.name)):
        if (version.manifest or {}).get("run") == run.folder.name:
            run.finish(version.reference)
            return version.reference
    return None


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


def _to_go_on_with(runs: Path, config: StageConfig) -> Path | None:
    """The run to go on with: one that was started with these settings, else any, which is refused for what differs.

    None when there is no run yet, so that `--resume` is safe in a job that is queued again.
    """
    found = sorted((path for path in runs.glob("*") if (path / STARTED).is_file()), reverse=True)
    return _unfinished([folder for folder in found if _was_started_with(folder, config)]) or _unfinished(found)


def _was_started_with(folder: Path, config: StageConfig) -> bool:
    """Whether a run has these settings, apart from what its references stand for."""
    try:
        saved = json.loads((folder / STARTED).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return all(saved.get(key) == value for key, value in settings_of(config).items() if key not in config.references)


def _unfinished(found: list[Path]) -> Path | None:
    """Of runs, newest first, the newest with a checkpoint, else the newest; a finished one newer than both ends the
    search.
    """
    for folder in found:
        if (folder / FINISHED).is_file():
            return found[0]
        if any(folder.glob("checkpoint-*")):
            return folder
    return found[0] if found else None


def _holds_work(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or any(folder.glob("checkpoint-*"))


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Hold the folder; the processes of one run hold it together, by the hand of the first."""
    with ExitStack() as stack:
        run.ranks.share(lambda: _hold(run.folder, stack))
        yield


def _hold(folder: Path, stack: ExitStack) -> None:
    # Opened for appending: whoever asks in vain must not wipe out who holds it.
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


def prepare_libraries(seed: int) -> None:
    """Seed every random state, and keep the libraries' bars (tokenising, shards) out of the run's own progress."""
    from datasets import disable_progress_bars
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    set_seed(seed)
    disable_progress_bars()
    disable_progress_bar()
