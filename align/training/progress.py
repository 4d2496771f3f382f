"""The progress of a run: a rich bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any, Self

from align.config import write

_SHOWN = {
    "loss": "loss", "eval_loss": "eval_loss", "score_mean": "score", "kl": "kl", "completion_length": "length",
    "accuracy": "accuracy", "rewards/accuracies": "rewards/accuracies", "eval_accuracy": "eval_accuracy",
    "learning_rate": "learning_rate", "tokens_per_second/rollout": "tokens/s: rollout",
    "tokens_per_second/scoring": "scoring", "tokens_per_second/update": "update",
}  # fmt: skip
"""the numbers of a step that are shown, in this order, and their labels"""


class Progress:
    """Progress of one loop of `total` steps; a context manager."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.fields[numbers]}"))
            self._task = self._bar.add_task(self.title, total=self.total, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        """Count finished steps."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def show(self, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers of a step."""
        text = "  ".join(f"{name} {numbers[key]:.4g}" for key, name in _SHOWN.items() if key in numbers)
        if self._bar is not None:
            self._bar.update(self._task, numbers=text)
        else:
            print_line(f"{self.title} {step}/{self.total}  {text}")


def print_line(text: str) -> None:
    """Print a line for the user; training goes on when nobody reads it any more (`| head`)."""
    try:
        write(text)
    except BrokenPipeError:
        # As Python's documentation advises, so that later writes and the flush at exit do not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
