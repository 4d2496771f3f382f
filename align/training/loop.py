"""Running a transformers or TRL trainer under a run's log, checkpoints and stops."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback

from align.errors import DivergedError, PreemptedError, UsageError
from align.training.stage import keep

if TYPE_CHECKING:
    from align.training.progress import Progress
    from align.training.run import Run

# Running totals and settings: the last value of a logging window stands for it, everything else is averaged.
_LAST = {"num_tokens", "learning_rate", "epoch"}
_SUMMARY = ("train_runtime", "total_flos", "train_loss", "train_samples_per_second", "train_steps_per_second")


def train(run: Run, trainer: Any) -> dict[str, float]:
    """Train to the end and return the last logged numbers.

    Raises DivergedError at the first number that is not finite and PreemptedError after a SIGTERM, its state saved.
    """
    trainer.remove_callback(PrinterCallback)
    found = run.resume_point()
    watch = _Watch(run)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
    state = trainer.state
    if run.stopping and state.global_step < state.max_steps:
        raise PreemptedError(
            f"stopped at step {state.global_step} of {state.max_steps}, saved in {run.folder}; "
            "go on with the same command and --resume"
        )
    _check_weights(trainer.model)
    return watch.last


class _Watch(TrainerCallback):
    """Writes the log, seals checkpoints, and stops the trainer when the run must stop."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.last: dict[str, float] = {}
        self._window: list[dict[str, float]] = []
        self._progress: Progress | None = None
        self._tokens, self._clock = 0.0, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            raise UsageError(
                f"warmup_ratio={self.run.config.warmup_ratio:g}: that is every one of the {state.max_steps} steps, so "
                "nothing would be learned; raise max_steps or set warmup_ratio=0"
            )
        self._context = self.run.progress(state.max_steps)
        self._progress = self._context.__enter__()
        self._progress.advance(state.global_step)
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.advance(1)
        if self.run.stopping:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if any(key.startswith("eval_") for key in numbers):
            self.last |= numbers
            self.run.log(state.global_step, numbers)
        elif "loss" in numbers:
            self._window.append(numbers)
            _refuse_nonfinite(self.run, state.global_step, numbers)
            if state.global_step % self.run.config.logging_steps == 0 or state.global_step >= state.max_steps:
                self._flush(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._flush(state.global_step)
        self._context.__exit__(None, None, None)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.checkpoints.seal(state.global_step)

    def _flush(self, step: int) -> None:
        if not self._window:
            return
        numbers = _average(self._window)
        now = time.perf_counter()
        tokens = numbers.get("num_tokens", 0.0)
        numbers["tokens_per_second"] = (tokens - self._tokens) / max(now - self._clock, 1e-9)
        self._tokens, self._clock, self._window = tokens, now, []
        self.last |= numbers
        self.run.log(step, numbers)


def _average(window: list[dict[str, float]]) -> dict[str, float]:
    keys = [key for key in window[-1] if key not in _SUMMARY]
    return {
        key: window[-1][key] if key in _LAST else sum(line.get(key, 0.0) for line in window) / len(window)
        for key in keys
    }


def _refuse_nonfinite(run: Run, step: int, numbers: dict[str, float]) -> None:
    watched = keep(numbers, "loss", "grad_norm")
    if not all(math.isfinite(value) for value in watched.values()):
        run.log(step, watched)


def _check_weights(model: Any) -> None:
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise DivergedError(f"{key}: not finite after training; nothing was registered; lower learning_rate")
