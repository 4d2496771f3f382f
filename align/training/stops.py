"""SIGTERM and Ctrl-C: they wait for a safe point once there is work to lose, and act at once before.

A run that has not begun a step has nothing to save. One that has begun finishes the step or the evaluation under way,
saves a checkpoint and ends; one that is past its last step registers and ends well.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, PreemptedError, StoppedError

if TYPE_CHECKING:
    from align.training.run import Run

_STOPPING = b"\nstopping at the next safe point, where everything is saved; Ctrl-C again stops at once\n"


class _Terminated(BaseException):
    """SIGTERM before the first step; no `except Exception` of a library may swallow it."""


@contextmanager
def handle_signals(run: Run) -> Iterator[None]:
    """Let SIGTERM and SIGINT set `run.stopping`.

    Raises PreemptedError (exit code 75) after SIGTERM and StoppedError (130) after Ctrl-C.
    """
    with _handlers(run):
        try:
            yield
        except _Terminated:
            raise PreemptedError(_message("stopped", run)) from None
        except AlignError as error:
            if isinstance(error, PreemptedError) and run.stopped_by == signal.SIGINT:
                raise StoppedError(str(error)) from None
            raise
        except KeyboardInterrupt:
            raise StoppedError(_message("interrupted", run)) from None


@contextmanager
def _handlers(run: Run) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: Any) -> None:
        again = run.stopping
        run.stop(number)
        if run.registered is not None:
            # What is left is to print it, which another Ctrl-C may cut short.
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        if number == signal.SIGINT and (again or not run.log.begun):
            raise KeyboardInterrupt
        if not run.log.begun:
            raise _Terminated
        if number == signal.SIGINT:
            # A print may be under way in the very stream that this would print to.
            os.write(2, _STOPPING)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _message(how: str, run: Run) -> str:
    """Return the message of a run that ends without saving."""
    if run.registered is not None:
        return f"{how} after {run.registered} was registered; nothing is left to do"
    if whole := run.checkpoints.list_sealed():
        return f"{how}; {whole[-1]} in {run.folder} is whole; go on from it with the same command and --resume"
    log = f", the log is in {run.folder}" if run.log.path.is_file() else ""
    return f"{how} with nothing saved yet{log}; start again with the same command"
