"""The trainer callbacks of a run: guards, stopping with checkpoints and early stopping, and the log.

They are called in this order: a guard ends a run before anything is saved, and the log's clock leaves saving out.
"""

# ruff: noqa: D102  (transformers documents what each `on_` method is for)

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from align.errors import DivergedError, UsageError

if TYPE_CHECKING:
    from align.training.progress import Progress
    from align.training.run import Run

_LAST_VALUE = {"num_tokens", "learning_rate", "epoch"}
"""running totals and settings, of which the last value of a logging window is written; of all others the mean"""
_TRAINER_SUMMARY = {
    "train_runtime", "total_flos", "train_loss", "train_samples_per_second", "train_steps_per_second",
    "train_tokens_per_second", "num_input_tokens_seen",
}  # fmt: skip
"""a trainer's summary of itself at the end, and its count of tokens since it was started"""
_MAX_STEPS_WITHOUT_GRADIENT = 10


class GuardCallback(TrainerCallback):
    """Ends a run whose numbers or weights are not finite, or that learns nothing."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._zero_steps, self._moved = 0, False

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on counting as when the checkpoint was sealed."""
        self._zero_steps, self._moved = saved["still"], saved["moved"]

    def progress(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        return {"still": self._zero_steps, "moved": self._moved}

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            raise UsageError(
                f"warmup_ratio={self._run.config.warmup_ratio:g}: that is every one of the {state.max_steps} steps, so "
                "nothing would be learned; raise max_steps or set warmup_ratio=0"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = _plain_numbers(logs)
        if "loss" not in numbers or _is_evaluation(numbers):
            return
        self._run.log.refuse_nonfinite(state.global_step, numbers)
        # Completions that all scored the same teach nothing, and the next rollout may.
        moves = numbers.get("grad_norm") != 0 or numbers.get("frac_reward_zero_std") == 1
        self._moved |= moves
        # A hinge that holds for every pair has loss zero: that run has learned what it was asked to.
        learned = self._moved and numbers["loss"] == 0
        self._zero_steps = 0 if moves or learned else self._zero_steps + 1
        if self._zero_steps >= _MAX_STEPS_WITHOUT_GRADIENT:
            raise DivergedError(
                f"step {state.global_step}: the gradient was exactly 0 for {_MAX_STEPS_WITHOUT_GRADIENT} steps in a "
                f"row (loss {numbers['loss']:g}), so nothing is learned and nothing was registered; look at the data "
                "with align data preview (answers that are equal once they are tokens, or nothing trained), "
                "or at a setting that takes the loss away (beta, loss_type, lora.alpha)"
            )

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        refuse_nonfinite_weights(self._run, parts["model"])


@dataclass
class EarlyStopping:
    """Counts evaluations in a row without a lower `eval_loss` than the best; with `limit` None it never stops.

    As transformers' EarlyStoppingCallback counts with a threshold of zero: an equal loss is no better.
    """

    limit: int | None = None
    best: float | None = None
    """the lowest eval_loss so far"""
    step: int = 0
    """the step of the lowest eval_loss"""
    misses: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    """the last logged numbers when the best step was evaluated"""

    @property
    def is_over(self) -> bool:
        """True when training should end."""
        return self.limit is not None and self.misses >= self.limit

    def add(self, step: int, loss: float, numbers: dict[str, float]) -> bool:
        """Count an evaluation and return whether it is the best so far."""
        if self.best is not None and loss >= self.best:
            self.misses += 1
            return False
        self.best, self.step, self.misses, self.numbers = loss, step, 0, dict(numbers)
        return True


class StopCallback(TrainerCallback):
    """Seals checkpoints, and stops the trainer after a signal or when evaluations no longer improve."""

    def __init__(self, run: Run, guard: GuardCallback, log: LogCallback) -> None:
        self._run, self._guard, self._log = run, guard, log
        self.over = False
        """whether the last step has been trained"""
        self._training = False
        self.early = EarlyStopping(getattr(run.config, "early_stopping_patience", None))

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on as when the checkpoint was sealed, under the patience asked for now."""
        self.over = saved["over"]
        self.early = EarlyStopping(**saved["patience"] | {"limit": self.early.limit})
        self._run.checkpoints.keep_best(self.early.step or None)
        if self.early.step and self.early.limit is not None:
            self._run.checkpoints.path_of(self.early.step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.over = state.global_step >= state.max_steps
        if state.global_step % self._run.config.save_unit == 0:
            self._stop_when_asked(control)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not self._training:
            return  # an evaluation after the last step only gives numbers
        loss = (metrics or {}).get("eval_loss")
        if self.early.limit is not None and loss is not None:
            if self.early.add(state.global_step, loss, self._log.last):
                self._run.checkpoints.keep_best(state.global_step)
                control.should_save = True
            if self.early.is_over:
                self.over = control.should_save = control.should_training_stop = True
                self._log.flush(state.global_step)
        self._stop_when_asked(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stopping = {"over": self.over, "patience": asdict(self.early)}
        progress = self._log.progress() | self._guard.progress() | stopping
        self._run.checkpoints.seal(state.global_step, progress)

    def _stop_when_asked(self, control: Any) -> None:
        """Save and stop here when a rank was asked to; a run at its last step ends by itself."""
        if self._run.ranks.any(self._run.stopping) and not self.over:
            self._run.stop(self._run.stopped_by or signal.SIGTERM)
            control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Writes the means of a logging window and the numbers of evaluations, and shows progress until `stack` closes."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self._run, self._stack = run, stack
        self.last: dict[str, float] = {}
        self._window: list[dict[str, float]] = []
        self._progress: Progress | None = None
        self._tokens, self._seconds, self._clock = 0, 0.0, time.perf_counter()

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with the logging window that was open when the checkpoint was sealed."""
        self.last, self._window = saved["last"], saved["window"]

    def progress(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        return {"last": self.last, "window": self._window}

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._progress = self._stack.enter_context(self._run.log.progress(state.max_steps))
        self._progress.advance(state.global_step)
        self._tokens, self._clock = state.num_input_tokens_seen, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        if self._progress is not None:
            self._progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = _plain_numbers(logs)
        if _is_evaluation(numbers):
            numbers.pop("eval_num_tokens", None)
            self.last |= numbers
            self._run.log.write(state.global_step, numbers)
        elif "loss" in numbers:
            self._window.append(numbers | {"num_tokens": float(state.num_input_tokens_seen)})
            ends = state.global_step >= state.max_steps
            if ends or state.global_step % self._run.config.logging_steps == 0:
                self.flush(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter()

    def flush(self, step: int) -> None:
        """Write the means of the open window; the speed is that of training alone."""
        if not self._window:
            return
        numbers = _average(self._window)
        tokens = int(numbers["num_tokens"])
        numbers["tokens_per_second"] = (tokens - self._tokens) / max(self._seconds, 1e-9)
        self._tokens, self._seconds, self._window = tokens, 0.0, []
        self.last |= numbers
        self._run.log.write(step, numbers)


def _plain_numbers(logs: dict[str, Any] | None) -> dict[str, float]:
    """Return the numbers of a trainer's log but for its summary of itself."""
    numbers = ((key, value) for key, value in (logs or {}).items() if key not in _TRAINER_SUMMARY)
    return {key: float(value) for key, value in numbers if isinstance(value, int | float)}


def _is_evaluation(numbers: dict[str, float]) -> bool:
    return any(key.startswith("eval_") for key in numbers)


def _average(window: list[dict[str, float]]) -> dict[str, float]:
    """Return means over the steps that have a number: a rollout's numbers are logged by the first step on it alone."""
    series: dict[str, list[float]] = {}
    for numbers in window:
        for key, value in numbers.items():
            series.setdefault(key, []).append(value)
    return {key: row[-1] if key in _LAST_VALUE else sum(row) / len(row) for key, row in series.items()}


def refuse_nonfinite_weights(run: Run, model: Any) -> None:
    """Raise DivergedError when a trained tensor is not finite; a checkpoint that is being written is removed."""
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            run.checkpoints.drop_unsealed()
            raise run.log.diverged(f"{key} is not finite")
