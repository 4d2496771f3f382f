"""The log of a run: metrics.jsonl, trackers and progress; numbers that are not finite end the run."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from align.config import StageConfig, write
from align.errors import DivergedError
from align.registry.durable import write_durably
from align.registry.redaction import redact
from align.training.checkpoints import LOG, Checkpoints
from align.training.trackers import TrackedRun, Trackers

_MUST_BE_FINITE = ("loss", "grad_norm", "eval_loss", "policy_loss", "value_loss")
_SHOWN = {
    "loss": "loss", "eval_loss": "eval_loss", "score_mean": "score", "kl": "kl", "completion_length": "length",
    "accuracy": "accuracy", "rewards/accuracies": "rewards/accuracies", "eval_accuracy": "eval_accuracy",
    "learning_rate": "learning_rate", "tokens_per_second/rollout": "tokens/s: rollout",
    "tokens_per_second/scoring": "scoring", "tokens_per_second/update": "update",
}  # fmt: skip
"""the numbers of a step that are shown, in this order, and their labels"""


class RunLog:
    """Writes the numbers of a run on rank 0; made by `Run`."""

    def __init__(self, stage: str, config: StageConfig, folder: Path, checkpoints: Checkpoints) -> None:
        self._stage, self._config, self._checkpoints = stage, config, checkpoints
        self._is_writer = checkpoints.ranks.is_rank_zero
        self.path = folder / LOG
        self.begun = False
        """whether a loop has started, so that there is something to save before stopping"""
        self._progress: Progress | None = None
        self._trackers = Trackers(list(config.report_to), folder)

    @contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        """Open the trackers and show progress over `total` steps; `advance` it once a step."""
        name = self._config.name
        if self._is_writer:
            settings = {"stage": self._stage} | redact(self._config.model_dump(mode="json"))
            self._trackers.open(TrackedRun(name, self.path.parent, settings))
        self.begun = True
        self._progress = Progress(name, total)
        with self._progress.shown() if self._is_writer else nullcontext():
            yield self._progress
        self._progress = None

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Append a line to metrics.jsonl, send it to the trackers and show it.

        Raises DivergedError when a loss or a gradient norm is not finite.
        """
        self.refuse_nonfinite(step, numbers)
        if not self._is_writer:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        self._trackers.add(step, numbers)
        if self._progress is not None:
            self._progress.show(step, numbers)

    def refuse_nonfinite(self, step: int, numbers: dict[str, float]) -> None:
        """Raise DivergedError when a loss or a gradient norm is not finite."""
        for key in _MUST_BE_FINITE:
            if key in numbers and not math.isfinite(numbers[key]):
                raise self.diverged(f"step {step}: {key} is {numbers[key]}")

    def diverged(self, problem: str) -> DivergedError:
        """Return the error that ends a run whose numbers are not finite; it names the last good checkpoint."""
        rate, whole = self._config.learning_rate, self._checkpoints.list_sealed()
        good = f"; the last whole checkpoint is {whole[-1]} in {self.path.parent}" if whole else ""
        go_on = f", also from there: --resume --allow-change learning_rate learning_rate={rate / 10:g}" if whole else ""
        return DivergedError(
            f"{problem}; training left the finite numbers and nothing was registered{good}; "
            f"lower learning_rate (now {rate:g}){go_on}, or check the data"
        )

    def forget_after(self, step: int) -> None:
        """Drop what was logged after a step, and a last line that a power cut left torn."""
        if not self._is_writer:
            return
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_durably(self.path, "".join(line for line in lines if _is_logged_by(line, step)).encode())
        self._trackers.forget_after(step)

    def close(self, *, ended_well: bool) -> None:
        """Close the trackers; a failure to do so changes nothing about how the run ended."""
        self._trackers.close(ended_well=ended_well)


def _is_logged_by(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False


class Progress:
    """Progress of one loop of `total` steps: a rich bar on a terminal, plain lines in a pipe."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, if there is one."""
        if not sys.stdout.isatty():
            yield
            return
        from rich import progress as rich

        text = rich.TextColumn
        columns = (text("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
        self._bar = rich.Progress(*columns, text("{task.fields[numbers]}"))
        self._task = self._bar.add_task(self.title, total=self.total, numbers="")
        with self._bar:
            yield

    def advance(self, steps: int = 1) -> None:
        """Count finished steps."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)

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
