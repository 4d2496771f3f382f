"""A trial of a stage for its plan: a few of its real steps on a shallow model with random weights, timed.

Trainer, rows, adapters, packing, loss and optimiser are those of the run. Nothing is printed, registered or kept.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.config import StageConfig
from align.data import RecordSet
from align.registry import open_registry
from align.training.checkpoints import Continuation
from align.training.ranks import Ranks
from align.training.run import Run
from align.training.stage import Stage
from align.training.training_data import TokenisedSplits


class TrialRows:
    """The data of a trial: the records as they are, and rows that are tokens already; it stands for `TrainingData`."""

    def __init__(self, records: RecordSet, rows: Any) -> None:
        self.train, self.held_out = records, None
        self._rows = rows

    def read(self) -> None:
        """Do nothing: all is read."""

    def tokenise(self, _tokenizer: Any) -> TokenisedSplits:
        """Return the rows."""
        return TokenisedSplits(self._rows)

    def fingerprint(self) -> dict[str, str]:
        """Return nothing: a trial is not resumed."""
        return {}


class StepClock:
    """The seconds of each step of a loop, and the numbers it has logged; it stands for `RunLog`."""

    def __init__(self, folder: Path) -> None:
        self.path, self.begun = folder / "metrics.jsonl", False
        self.seconds: list[float] = []
        self.numbers: list[dict[str, float]] = []
        self._last = 0.0

    @contextmanager
    def progress(self, _total: int) -> Iterator[StepClock]:
        """Start the clock."""
        self._last = time.perf_counter()
        yield self

    def advance(self, steps: int = 1) -> None:
        """End a step."""
        _wait_for_device()
        now = time.perf_counter()
        if steps:
            self.seconds.append(now - self._last)
        self._last = now

    def write(self, _step: int, numbers: dict[str, float]) -> None:
        """Keep the numbers of a step."""
        self.numbers.append(numbers)

    def refuse_nonfinite(self, _step: int, _numbers: dict[str, float]) -> None:
        """Do nothing: a random model may do what it likes."""

    def forget_after(self, _step: int) -> None:
        """Do nothing: nothing was logged before."""


def time_trial(stage: Stage, config: StageConfig, data: TrialRows, models: dict[str, Callable[..., None]]) -> StepClock:
    """Run a few steps of a stage on models that are written first: the `base`, and adapters by setting over it.

    Registry, cache and run folder are temporary.
    """
    with TemporaryDirectory(prefix="align-trial-") as name, redirect_stdout(io.StringIO()):
        root = Path(name)
        base, folder = root / "base", root / "run"
        folder.mkdir()
        # A reward model that is no adapter reads text, and would be loaded whole.
        changes = {setting: str(base) if setting == "model" else None for setting in config.references if models}
        for setting, write_model in models.items():
            if setting == "base":
                write_model(base)
            else:
                write_model(base, root / setting)
                changes[setting] = str(root / setting)
        registry = open_registry(str(root / "registry"))
        run = Run(stage, config.model_copy(update=changes), registry, folder, Ranks(), Continuation())
        clock = StepClock(folder)
        run.data, run.log = data, clock  # type: ignore[assignment]
        stage.run(run.config, run)
        return clock


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
