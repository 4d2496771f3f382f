"""Being asked to stop: SIGTERM and Ctrl-C wait for a safe point once there is work to lose, and act at once before.

A run that has not begun a step has nothing to save. One that has begun finishes the step or the evaluation under way,
saves a checkpoint and ends; one that is past its last step finishes registering and ends well.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, PreemptedError, StoppedError

if TYPE_CHECKING:
    from align.training.run import Run

_WAIT = b"\nstopping at the next safe point, where everything is saved; Ctrl-C again stops at once\n"


class _Left(BaseException):
    """SIGTERM before the first step; no `except Exception` of a library may swallow it."""


@contextmanager
def heed_signals(run: Run) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT set `run.stopping`; what a stopped run raises leaves as one of our errors.

    Raises PreemptedError (exit code 75) after SIGTERM and StoppedError (130) after Ctrl-C.
    """
    with _handlers(run):
        try:
            yield
        except _Left:
            raise PreemptedError(_told("stopped", run)) from None
        except AlignError as error:
            if isinstance(error, PreemptedError) and run.stopped_by == signal.SIGINT:
                raise StoppedError(str(error)) from None
            raise
        except KeyboardInterrupt:
            raise StoppedError(_told("interrupted", run)) from None


@contextmanager
def _handlers(run: Run) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: Any) -> None:
        again, run.stopped_by = run.stopping, number
        if run.registered is not None:
            # What is left is to say so, which somebody who waits for it may cut short.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        if number == signal.SIGINT and (again or not run.begun):
            raise KeyboardInterrupt
        if not run.begun:
            raise _Left
        if number == signal.SIGINT:
            # A print may be under way in the very stream that this would print to.
            os.write(2, _WAIT)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _told(how: str, run: Run) -> str:
    """What became of the work of a run that ends without saving."""
    if run.registered is not None:
        return f"{how} after {run.registered} was registered; nothing is left to do"
    whole = run.checkpoints.whole()
    if whole:
        return f"{how}; {whole[-1]} in {run.folder} is whole; go on from it with the same command and --resume"
    return f"{how} with nothing saved yet{_where(run.folder)}; start again with the same command"


def _where(folder: Path) -> str:
    log = folder / "metrics.jsonl"
    return f", the log is in {folder}" if log.is_file() else ""
