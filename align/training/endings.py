"""Runs that end before their time: SIGTERM and Ctrl-C, a full disk, too little memory, another rank that is gone.

A signal waits for a safe point once there is work to lose, and acts at once before. A run that has not begun a step has
nothing to save. One that has begun finishes the step or the evaluation under way, saves a checkpoint and ends; one that
is past its last step registers and ends well.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, MachineError, PreemptedError, StoppedError

if TYPE_CHECKING:
    from align.config import StageConfig
    from align.training.run import Run

_STOPPING = b"\nstopping at the next safe point, where everything is saved; Ctrl-C again stops at once\n"
_FULL_BYTES = 64 * 1024
"""with fewer free bytes than this nothing that a run writes fits"""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report a file that could not be written without an error number, and without its name.
_UNWRITTEN = ("inline_container", "iostream error", "No space left on device", "Disk quota exceeded", "File too large")
_UNALLOCATED = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "Cannot allocate memory")
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
_ROOM_CHECKPOINTS = 3
"""checkpoints that must fit before training starts: the two that are kept and the one being written"""


class _Terminated(BaseException):
    """SIGTERM before the first step; no `except Exception` of a library may swallow it."""


@contextmanager
def handle_signals(run: Run) -> Iterator[None]:
    """Let SIGTERM and SIGINT set `run.stopping`.

    Raises PreemptedError (exit code 75) after SIGTERM and StoppedError (130) after Ctrl-C.
    """
    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if in_main else ()
    previous = {number: signal.signal(number, lambda number, _: _stop(run, number)) for number in numbers}
    try:
        yield
    except _Terminated:
        raise PreemptedError(_unsaved("stopped", run)) from None
    except PreemptedError as error:
        if run.stopped_by == signal.SIGINT:
            raise StoppedError(str(error)) from None
        raise
    except StoppedError:
        raise
    except KeyboardInterrupt:
        raise StoppedError(_unsaved("interrupted", run)) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(run: Run, number: int) -> None:
    """Let a signal stop a run: at its next safe point, or at once where nothing would be lost or Ctrl-C came twice."""
    again = run.stopping
    run.stopped_by = number
    # After the registration what is left is to print it, which Ctrl-C may cut short.
    if number == signal.SIGINT and (again or not run.log.begun or run.registered is not None):
        raise KeyboardInterrupt
    if run.registered is not None:
        return
    if not run.log.begun:
        raise _Terminated
    if number == signal.SIGINT:
        # A print may be under way in the very stream that this would print to.
        os.write(2, _STOPPING)


def _unsaved(how: str, run: Run) -> str:
    """Return the message of a run that ends without saving."""
    if run.registered is not None:
        return f"{how} after {run.registered} was registered; nothing is left to do"
    if whole := run.checkpoints.list_sealed():
        return f"{how}; {whole[-1]} in {run.folder} is whole; go on from it with the same command and --resume"
    log = f", the log is in {run.folder}" if run.log.path.is_file() else ""
    return f"{how} with nothing saved yet{log}; start again with the same command"


@contextmanager
def explain_shortage(run: Run) -> Iterator[None]:
    """Turn what libraries raise when disk or memory run out into a MachineError, and remove an unsealed checkpoint."""
    try:
        yield
    except (AlignError, KeyboardInterrupt):
        raise
    except Exception as error:
        sealed = run.checkpoints.list_sealed()
        explained = _full_disk(run, error) or out_of_memory(run.config, sealed, error)
        if explained is None and run.ranks.world_size > 1 and any(sign in str(error) for sign in _GONE):
            explained = MachineError(
                f"process {run.ranks.rank} of {run.ranks.world_size}: another process of this run ended; nothing was "
                "registered; see what it printed before this, go on with the same command and --resume"
            )
        if explained is None:
            raise
        run.checkpoints.drop_unsealed()
        raise explained from error


def _full_disk(run: Run, error: Exception) -> MachineError | None:
    number, text = getattr(error, "errno", None), str(error)
    at = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else run.folder
    free = shutil.disk_usage(next(path for path in [at, *at.parents] if path.exists())).free
    full = isinstance(error, OSError | RuntimeError) and free <= _FULL_BYTES
    if not (full or number in _DISK or any(sign in text for sign in _UNWRITTEN)):
        return None
    no_space = full or number == errno.ENOSPC or "No space" in text
    why = "the disk is full" if no_space else "the file could not be written"
    kept = ", ".join(run.checkpoints.list_sealed())
    return MachineError(
        f"{at}: {why}, {free:,} bytes are free; nothing was registered; whole checkpoints in {run.folder}: "
        f"{kept or 'none'}; free space and {'go on with the same command and --resume' if kept else 'start again'}"
    )


def out_of_memory(config: StageConfig, whole: list[str], error: BaseException) -> MachineError | None:
    """Return the error to raise when memory ran out; it names settings that keep the rows of a step."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if not (named or (isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _UNALLOCATED))):
        return None
    request = re.search(r"tried to allocate [\d.,]+ ?\w+", str(error), re.IGNORECASE)
    said = request[0] if request else "no more could be allocated"
    batch_size = config.per_device_train_batch_size
    rows = batch_size * config.gradient_accumulation_steps
    smaller = next((size for size in range(batch_size // 2, 0, -1) if rows % size == 0), None)
    changes: dict[str, int | str] = {}
    if smaller is not None:
        changes = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": rows // smaller}
    if not config.gradient_checkpointing:
        changes["gradient_checkpointing"] = "true"
    go_on = f" (from {whole[-1]}: add --resume --allow-change {','.join(changes)})" if whole and changes else ""
    remedy = " ".join(f"{key}={value}" for key, value in changes.items())
    return MachineError(
        f"out of memory with per_device_train_batch_size={batch_size} and max_length={config.max_length}: {said}; "
        "nothing was registered; "
        f"try {remedy or 'a smaller max_length, a smaller model or quantization=nf4'}{go_on}"
    )


def refuse_small_disk(run: Run, model: Any) -> None:
    """Raise MachineError when the disk cannot hold what training saves: weights, and AdamW's two moments of each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    checkpoint = 3 * weights
    saves = bool(run.config.save_steps)
    room = max(1, _ROOM_CHECKPOINTS - len(run.checkpoints.list_sealed()))
    needed = room * checkpoint if saves else weights
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        what = f"{room} checkpoints of about {_size(checkpoint)}" if saves else f"weights of {_size(weights)}"
        raise MachineError(
            f"{run.folder}: {what} need {_size(needed)}, {_size(free)} is free; free space or choose another --registry"
            + (", or save_steps=0 to keep no checkpoints" if saves else "")
        )


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
