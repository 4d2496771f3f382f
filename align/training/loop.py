"""Running a transformers or TRL trainer under the log, checkpoints and stops of a run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback

from align.config import TrainerStageConfig
from align.errors import PreemptedError
from align.models.adapters import tuner_callbacks
from align.models.packed import use_fast_path
from align.training.callbacks import GuardCallback, LogCallback, StopCallback, refuse_nonfinite_weights
from align.training.shortage import refuse_small_disk

if TYPE_CHECKING:
    from align.training.run import Run


def train(run: Run, trainer: Any) -> dict[str, float]:
    """Train to the end and return the last logged numbers, or those of the best step when the run stops early.

    Raises DivergedError at the first number that is not finite and PreemptedError after a SIGTERM, its state saved.
    """
    _prepare_trainer(run, trainer)
    run.ranks.from_rank_zero(lambda: refuse_small_disk(run, trainer.model))
    point = run.resume_point()
    with ExitStack() as stack:
        guard, log = GuardCallback(run), LogCallback(run, stack)
        stop = StopCallback(run, guard, log)
        if point is not None:
            for callback in (guard, log, stop):
                callback.restore(run.checkpoints.progress_of(point[1]))
        for callback in (guard, _AllowedChanges(run), stop, log, *tuner_callbacks(trainer.model)):
            trainer.add_callback(callback)
        if point is not None and stop.over:
            # The trainer itself would take one more step.
            run.print_line("training is already complete; what is left is to register it")
            _load_weights(trainer, point[1])
            trainer.state.global_step = point[0]
        else:
            trainer.train(resume_from_checkpoint=str(point[1]) if point else None)
    if run.stopping and not stop.over:
        raise PreemptedError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in {run.folder}; "
            "go on with the same command and --resume"
        )
    numbers = _load_best(run, trainer, stop) or log.last
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


def _load_weights(trainer: Any, checkpoint: Path) -> None:
    """Load the weights of a checkpoint, as the trainer itself does when it resumes."""
    trainer._load_from_checkpoint(str(checkpoint))


def _load_best(run: Run, trainer: Any, stop: StopCallback) -> dict[str, float] | None:
    """Load the step with the lowest eval_loss and return its numbers; None when early stopping was not asked for."""
    early = stop.early
    if early.limit is None or early.best is None:
        return None
    misses = f"stopped early after {early.misses} evaluations without a lower eval_loss; " if early.is_over else ""
    run.print_line(f"{misses}the best eval_loss is {early.best:.4g} at step {early.step}, whose weights are taken")
    _load_weights(trainer, run.checkpoints.path_of(early.step))
    return dict(early.numbers)


class _AllowedChanges(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        # The trainer puts what is not decayed (biases, norms) into a second group.
        apply_changes(self._run, parts["optimizer"], parts["lr_scheduler"], decayed=1)


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
