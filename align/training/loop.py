"""Running a transformers or TRL trainer under a run's log, checkpoints and stops."""

from __future__ import annotations

import math
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback

from align.config import TrainerStageConfig
from align.errors import DivergedError, PreemptedError, UsageError
from align.models.packed import use_fast_path
from align.training.patience import Patience
from align.training.shortage import refuse_small_disk
from align.training.stage import select_metrics

if TYPE_CHECKING:
    from align.training.progress import Progress
    from align.training.run import Run

# Running totals and settings: the last value of a logging window stands for it, everything else is averaged.
_LAST = {"num_tokens", "learning_rate", "epoch"}
# What a trainer says about itself: a summary at the end, and its own count of tokens and speed since it was started.
_OWN = {
    "train_runtime", "total_flos", "train_loss", "train_samples_per_second", "train_steps_per_second",
    "train_tokens_per_second", "num_input_tokens_seen",
}  # fmt: skip
_STILL = 10
"""steps in a row with a gradient of exactly zero before a run is ended"""


def train(run: Run, trainer: Any) -> dict[str, float]:
    """Train to the end and return the last logged numbers, or those of the best step when the run stops early.

    Raises DivergedError at the first number that is not finite and PreemptedError after a SIGTERM, its state saved.
    """
    _prepare(trainer)
    if isinstance(run.config, TrainerStageConfig) and run.config.fast_path and type(trainer) is not Trainer:
        use_fast_path(trainer.model, run.say, getattr(trainer, "temperature", 1.0))
    run.ranks.share(lambda: refuse_small_disk(run, trainer.model))
    found = run.resume_point()
    with ExitStack() as stack:
        watch = _Watch(run, stack)
        if found is not None:
            watch.restore(run.checkpoints.progress_of(found[1]))
        trainer.add_callback(watch)
        if found is not None and watch.over:
            # The trainer itself would take one more step.
            run.say("training is already complete; what is left is to register it")
            _load(trainer, found[1])
            trainer.state.global_step = found[0]
        else:
            watch.training = True
            trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
            watch.training = False
    if run.stopping and not watch.over:
        raise PreemptedError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in {run.folder}; "
            "go on with the same command and --resume"
        )
    _take_best(run, trainer, watch)
    refuse_nonfinite_weights(run, trainer.model)
    return watch.last


def _prepare(trainer: Any) -> None:
    """Leave printing, pictures and counting to us; a plain trainer pads nothing, so it counts every token.

    A trainer that samples (it has a number of generations) counts prompts and completions itself.
    """
    trainer.remove_callback(PrinterCallback)
    counted = "no" if hasattr(trainer, "num_generations") else "non_padding"
    trainer.args.include_num_input_tokens_seen = "all" if type(trainer) is Trainer else counted


def _load(trainer: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the model, as the trainer itself does when it resumes."""
    trainer._load_from_checkpoint(str(checkpoint))


def _take_best(run: Run, trainer: Any, watch: _Watch) -> None:
    """Go back to the step with the lowest eval_loss when the run was asked to watch it."""
    patience = watch.patience
    if patience.limit is None or patience.best is None:
        return
    early = f"stopped early after {patience.misses} evaluations without a lower eval_loss; " if patience.spent else ""
    run.say(f"{early}the best eval_loss is {patience.best:.4g} at step {patience.step}, whose weights are taken")
    watch.last = dict(patience.numbers)
    _load(trainer, run.checkpoints.path_of(patience.step))


class _Watch(TrainerCallback):
    """Writes the log, seals checkpoints, and stops the trainer when the run must stop."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self.run = run
        self.last: dict[str, float] = {}
        self.over = False
        """whether the last step has been trained"""
        self.training = False
        """whether the trainer is between its first step and its last; evaluations after that only give numbers"""
        self.patience = Patience(getattr(run.config, "early_stopping_patience", None))
        self._stack = stack
        self._window: list[dict[str, float]] = []
        self._progress: Progress | None = None
        self._still, self._moved = 0, False
        self._tokens, self._seconds, self._clock = 0, 0.0, time.perf_counter()

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on as when the checkpoint was sealed: the open logging window and the patience left."""
        self.last, self._window, self.over = saved["last"], saved["window"], saved["over"]
        self._still, self._moved = saved["still"], saved["moved"]
        self.patience = Patience.restored(self.patience.limit, saved["patience"])
        self.run.checkpoints.best = self.patience.step or None
        if self.run.checkpoints.best is not None and self.patience.limit is not None:
            self.run.checkpoints.path_of(self.patience.step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            raise UsageError(
                f"warmup_ratio={self.run.config.warmup_ratio:g}: that is every one of the {state.max_steps} steps, so "
                "nothing would be learned; raise max_steps or set warmup_ratio=0"
            )
        # The trainer puts what is not decayed (biases, norms) into a second group.
        apply_changes(self.run, parts["optimizer"], parts["lr_scheduler"], decayed=1)
        self._progress = self._stack.enter_context(self.run.progress(state.max_steps))
        self._progress.advance(state.global_step)
        self._tokens, self._clock = state.num_input_tokens_seen, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._count_time()
        if self._progress is not None:
            self._progress.advance(1)
        self.over = state.global_step >= state.max_steps
        if state.global_step % self.run.config.save_unit == 0:
            self._heed(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = {
            key: float(value)
            for key, value in (logs or {}).items()
            if isinstance(value, int | float) and key not in _OWN
        }
        if any(key.startswith("eval_") for key in numbers):
            numbers.pop("eval_num_tokens", None)
            self.last |= numbers
            self.run.log(state.global_step, numbers)
        elif "loss" in numbers:
            numbers["num_tokens"] = float(state.num_input_tokens_seen)
            self._window.append(numbers)
            self._refuse(state.global_step, numbers)
            if state.global_step % self.run.config.logging_steps == 0 or self.over:
                self._flush(state.global_step)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not self.training:
            return
        loss = (metrics or {}).get("eval_loss")
        if self.patience.limit is not None and loss is not None:
            if self.patience.see(state.global_step, loss, self.last):
                self.run.checkpoints.best = state.global_step
                control.should_save = True
            if self.patience.spent:
                self.over = control.should_save = control.should_training_stop = True
                self._flush(state.global_step)
        self._heed(control)
        self._clock = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        refuse_nonfinite_weights(self.run, parts["model"])
        self.run.checkpoints.seal(state.global_step, self._saved())
        self._clock = time.perf_counter()

    def _heed(self, control: Any) -> None:
        """Save and stop here when somebody asked for it; a run at its last step ends by itself."""
        if self.run.ranks.any(self.run.stopping) and not self.over:
            self.run.stopped_by = self.run.stopped_by or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def _saved(self) -> dict[str, Any]:
        return {
            "last": self.last, "window": self._window, "over": self.over, "still": self._still, "moved": self._moved,
            "patience": self.patience.saved(),
        }  # fmt: skip

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now

    def _flush(self, step: int) -> None:
        """Write the mean of the steps since the last line; the speed is that of training alone."""
        if not self._window:
            return
        numbers = _average(self._window)
        tokens = int(numbers["num_tokens"])
        numbers["tokens_per_second"] = (tokens - self._tokens) / max(self._seconds, 1e-9)
        self._tokens, self._seconds, self._window = tokens, 0.0, []
        self.last |= numbers
        self.run.log(step, numbers)

    def _refuse(self, step: int, numbers: dict[str, float]) -> None:
        """End the run at a number that is not finite, and when nothing has been learned for many steps."""
        for key, value in select_metrics(numbers, "loss", "grad_norm").items():
            if not math.isfinite(value):
                raise self.run.diverged(f"step {step}: {key} is {value}")
        # Completions that all scored the same teach nothing, and the next rollout may.
        moves = numbers.get("grad_norm") != 0 or numbers.get("frac_reward_zero_std") == 1
        self._moved |= moves
        # A hinge that holds for every pair has loss zero: that run has learned what it was asked to.
        learned = self._moved and numbers["loss"] == 0
        self._still = 0 if moves or learned else self._still + 1
        if self._still >= _STILL:
            raise DivergedError(
                f"step {step}: the gradient was exactly 0 for {_STILL} steps in a row (loss {numbers['loss']:g}), so "
                "nothing is learned and nothing was registered; look at the data with align data preview "
                "(answers that are equal once they are tokens, or nothing trained), or at a setting that takes the "
                "loss away (beta, loss_type, lora.alpha)"
            )


def _average(window: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps that have a number: a rollout's are logged by the first step on it alone."""
    found: dict[str, list[float]] = {}
    for line in window:
        for key, value in line.items():
            found.setdefault(key, []).append(value)
    return {key: values[-1] if key in _LAST else sum(values) / len(values) for key, values in found.items()}


def apply_changes(run: Run, optimizer: Any, scheduler: Any, *, decayed: int) -> None:
    """Let an allowed change of learning_rate or weight_decay take effect: what was saved would bring back the old.

    The first `decayed` groups of the optimizer are those that weight decay applies to.
    """
    allowed, config = run.checkpoints.allow_change, run.config
    if "weight_decay" in allowed:
        for group in optimizer.param_groups[:decayed]:
            group["weight_decay"] = config.weight_decay
    if "learning_rate" in allowed:
        scheduler.base_lrs = [config.learning_rate] * len(scheduler.base_lrs)
        for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = config.learning_rate
            group["lr"] = config.learning_rate * share(scheduler.last_epoch)
        # The trainer logs the rate from here.
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def refuse_nonfinite_weights(run: Run, model: Any) -> None:
    """Raise DivergedError when a trained tensor is not finite; what was being saved then is removed."""
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            run.checkpoints.drop_unsealed()
            raise run.diverged(f"{key} is not finite")
