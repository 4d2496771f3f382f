"""Running a transformers or TRL trainer under the log, checkpoints and stops of a run.

Three callbacks, called in this order: a guard ends a run before anything is saved, and the log's clock leaves saving
out.
"""

# ruff: noqa: D102  (transformers documents what each `on_` method is for)

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback

from align.config import TrainerStageConfig
from align.errors import DivergedError, PreemptedError
from align.models.adapters import tuner_callbacks
from align.models.packed import use_fast_path
from align.training.endings import refuse_small_disk
from align.training.run import Run
from align.training.run_log import Progress

_LAST_VALUE = {"num_tokens", "learning_rate", "epoch"}
"""running totals and settings, of which the last value of a logging window is written; of all others the mean"""
_TRAINER_SUMMARY = {
    "train_runtime", "total_flos", "train_loss", "train_samples_per_second", "train_steps_per_second",
    "train_tokens_per_second", "num_input_tokens_seen",
}  # fmt: skip
"""a trainer's summary of itself at the end, and its count of tokens since it was started"""
_MAX_STEPS_WITHOUT_GRADIENT = 10


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


@dataclass
class LoopState:
    """The counts of the callbacks since the run began; sealed with every checkpoint."""

    last: dict[str, float] = field(default_factory=dict)
    """the numbers logged last"""
    window: list[dict[str, float]] = field(default_factory=list)
    """the numbers of the steps since then"""
    still: int = 0
    """steps in a row without a gradient"""
    moved: bool = False
    """whether any step had a gradient"""
    over: bool = False
    """whether the last step has been trained"""
    patience: EarlyStopping = field(default_factory=EarlyStopping)


def train(run: Run, trainer: Any) -> dict[str, float]:
    """Train to the end and return the last logged numbers, or those of the best step when the run stops early.

    Raises DivergedError at the first number that is not finite and PreemptedError after a SIGTERM, its state saved.
    """
    _prepare_trainer(run, trainer)
    run.ranks.from_rank_zero(lambda: refuse_small_disk(run, trainer.model))
    point = run.resume_point()
    state = LoopState(patience=EarlyStopping(getattr(run.config, "early_stopping_patience", None)))
    if point is not None:
        saved = run.checkpoints.progress_of(point[1])
        state = LoopState(**saved | {"patience": EarlyStopping(**saved["patience"] | {"limit": state.patience.limit})})
        run.checkpoints.best = state.patience.step or None
        if state.patience.step and state.patience.limit is not None:
            run.checkpoints.path_of(state.patience.step)
    with ExitStack() as stack:
        log = LogCallback(run, state, stack)
        ours = (GuardCallback(run, state), _AllowedChanges(run), StopCallback(run, state, log), log)
        for callback in (*ours, *tuner_callbacks(trainer.model)):
            trainer.add_callback(callback)
        if point is not None and state.over:
            # The trainer itself would take one more step.
            run.print_line("training is already complete; what is left is to register it")
            trainer._load_from_checkpoint(str(point[1]))
            trainer.state.global_step = point[0]
        else:
            trainer.train(resume_from_checkpoint=str(point[1]) if point else None)
    if run.stopping and not state.over:
        raise PreemptedError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in {run.folder}; "
            "go on with the same command and --resume"
        )
    numbers = _load_best(run, trainer, state.patience) or state.last
    refuse_nonfinite_weights(run, trainer.model)
    return numbers


def _prepare_trainer(run: Run, trainer: Any) -> None:
    """Use the fast path, and leave printing to the run.

    A plain trainer pads nothing, so it counts every token; one that samples counts prompts and completions itself.
    """
    plain = type(trainer) is Trainer
    trainer.remove_callback(PrinterCallback)
    counted = "no" if hasattr(trainer, "num_generations") else "non_padding"
    trainer.args.include_num_input_tokens_seen = "all" if plain else counted
    if isinstance(run.config, TrainerStageConfig) and run.config.fast_path and not plain:
        use_fast_path(trainer.model, run.print_line, getattr(trainer, "temperature", 1.0))


def _load_best(run: Run, trainer: Any, early: EarlyStopping) -> dict[str, float] | None:
    """Load the step with the lowest eval_loss and return its numbers; None when early stopping was not asked for."""
    if early.limit is None or early.best is None:
        return None
    misses = f"stopped early after {early.misses} evaluations without a lower eval_loss; " if early.is_over else ""
    run.print_line(f"{misses}the best eval_loss is {early.best:.4g} at step {early.step}, whose weights are taken")
    trainer._load_from_checkpoint(str(run.checkpoints.path_of(early.step)))
    return dict(early.numbers)


def refuse_nonfinite_weights(run: Run, model: Any) -> None:
    """Raise DivergedError when a trained tensor is not finite; a checkpoint that is being written is removed."""
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            run.checkpoints.drop_unsealed()
            raise run.log.diverged(f"{key} is not finite")


def apply_changes(run: Run, optimizer: Any, scheduler: Any, *, decayed: int) -> None:
    """Set an allowed change of learning_rate or weight_decay, which loading a checkpoint has set back.

    The first `decayed` groups of the optimizer are those that weight decay applies to.
    """
    allowed, config = run.checkpoints.continuation.allow_change, run.config
    if "weight_decay" in allowed:
        for group in optimizer.param_groups[:decayed]:
            group["weight_decay"] = config.weight_decay
    if "learning_rate" in allowed:
        scheduler.base_lrs = [config.learning_rate] * len(scheduler.base_lrs)
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = config.learning_rate
            group["lr"] = config.learning_rate * factor(scheduler.last_epoch)
        # The trainer logs the rate from here.
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


class _AllowedChanges(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        # The trainer puts what is not decayed (biases, norms) into a second group.
        apply_changes(self._run, parts["optimizer"], parts["lr_scheduler"], decayed=1)


class GuardCallback(TrainerCallback):
    """Ends a run whose numbers or weights are not finite, or that learns nothing."""

    def __init__(self, run: Run, counted: LoopState) -> None:
        self._run, self._counted = run, counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._run.config.refuse_endless_warmup(state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers, counted = _plain_numbers(logs), self._counted
        if "loss" not in numbers or _is_evaluation(numbers):
            return
        self._run.log.refuse_nonfinite(state.global_step, numbers)
        # Completions that all scored the same teach nothing, and the next rollout may.
        moves = numbers.get("grad_norm") != 0 or numbers.get("frac_reward_zero_std") == 1
        counted.moved |= moves
        # A hinge that holds for every pair has loss zero: that run has learned what it was asked to.
        learned = counted.moved and numbers["loss"] == 0
        counted.still = 0 if moves or learned else counted.still + 1
        if counted.still >= _MAX_STEPS_WITHOUT_GRADIENT:
            raise DivergedError(
                f"step {state.global_step}: the gradient was exactly 0 for {_MAX_STEPS_WITHOUT_GRADIENT} steps in a "
                f"row (loss {numbers['loss']:g}), so nothing is learned and nothing was registered; look at the data "
                "with align data preview (answers that are equal once they are tokens, or nothing trained), "
                "or at a setting that takes the loss away (beta, loss_type, lora.alpha)"
            )

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        refuse_nonfinite_weights(self._run, parts["model"])


class StopCallback(TrainerCallback):
    """Seals checkpoints, and stops the trainer after a signal or when evaluations no longer improve."""

    def __init__(self, run: Run, counted: LoopState, log: LogCallback) -> None:
        self._run, self._counted, self._log = run, counted, log
        self._training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = False  # an evaluation after the last step only gives numbers

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counted.over = state.global_step >= state.max_steps
        if state.global_step % self._run.config.save_unit == 0:
            self._stop_when_asked(control)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not self._training:
            return
        early, loss = self._counted.patience, (metrics or {}).get("eval_loss")
        if early.limit is not None and loss is not None:
            if early.add(state.global_step, loss, self._counted.last):
                self._run.checkpoints.best = state.global_step
                control.should_save = True
            if early.is_over:
                self._counted.over = control.should_save = control.should_training_stop = True
                self._log.flush(state.global_step)
        self._stop_when_asked(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.checkpoints.seal(state.global_step, asdict(self._counted))

    def _stop_when_asked(self, control: Any) -> None:
        """Save and stop here when a rank was asked to; a run at its last step ends by itself."""
        if self._run.ranks.any(self._run.stopping) and not self._counted.over:
            self._run.stopped_by = self._run.stopped_by or signal.SIGTERM
            control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Writes the means of a logging window and the numbers of evaluations, and shows progress until `stack` closes."""

    def __init__(self, run: Run, counted: LoopState, stack: ExitStack) -> None:
        self._run, self._counted, self._stack = run, counted, stack
        self._progress: Progress | None = None
        self._tokens, self._seconds, self._clock = 0, 0.0, time.perf_counter()

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
            self._counted.last |= numbers
            self._run.log.write(state.global_step, numbers)
        elif "loss" in numbers:
            self._counted.window.append(numbers | {"num_tokens": float(state.num_input_tokens_seen)})
            ends = state.global_step >= state.max_steps
            if ends or state.global_step % self._run.config.logging_steps == 0:
                self.flush(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter()

    on_save = on_evaluate

    def flush(self, step: int) -> None:
        """Write the means of the open window; the speed is that of training alone.

        A mean is over the steps that have the number: those of a rollout are logged by the first step on it alone.
        """
        if not self._counted.window:
            return
        series: dict[str, list[float]] = {}
        for row in self._counted.window:
            for key, value in row.items():
                series.setdefault(key, []).append(value)
        numbers = {key: row[-1] if key in _LAST_VALUE else sum(row) / len(row) for key, row in series.items()}
        tokens = int(numbers["num_tokens"])
        numbers["tokens_per_second"] = (tokens - self._tokens) / max(self._seconds, 1e-9)
        self._tokens, self._seconds, self._counted.window = tokens, 0.0, []
        self._counted.last |= numbers
        self._run.log.write(step, numbers)


def _plain_numbers(logs: dict[str, Any] | None) -> dict[str, float]:
    """Return the numbers of a trainer's log but for its summary of itself."""
    numbers = ((key, value) for key, value in (logs or {}).items() if key not in _TRAINER_SUMMARY)
    return {key: float(value) for key, value in numbers if isinstance(value, int | float)}


def _is_evaluation(numbers: dict[str, float]) -> bool:
    return any(key.startswith("eval_") for key in numbers)
