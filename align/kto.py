"""Kahneman-Tversky optimisation: learn from answers that are good or bad by themselves (Ethayarajh et al. 2024, eq. 8).

The reference is always a frozen copy of what the policy starts as, so the first loss is a half of the mean weight.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.errors import UsageError
from align.peft_config import PeftStageConfig
from align.training.command import main
from align.training.stage import Stage, Trained, select_metrics
from align.tuners import Ability

if TYPE_CHECKING:
    from datasets import Dataset

    from align.training.reference import Expected
    from align.training.run import Run


class KtoConfig(PeftStageConfig):
    """Settings of Kahneman-Tversky optimisation."""

    tuner_abilities: ClassVar[tuple[Ability, ...]] = ("copy",)

    learning_rate: float = Field(5e-6, gt=0, le=1)
    """peak learning rate"""
    per_device_train_batch_size: int = Field(8, ge=2)
    """rows in a forward pass; the KL is estimated over them, so there are at least two"""
    beta: float = Field(0.1, gt=0)
    """how strongly the policy is held to its reference"""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """loss on an answer, by its TRL name"""
    desirable_weight: float | None = Field(None, gt=0)
    """weight of good answers; by default such that good and bad ones weigh the same together"""
    undesirable_weight: float | None = Field(None, gt=0)
    """weight of bad answers; by default as above"""
    cache_reference: bool = True
    """compute the reference's log-probabilities once and keep them, instead of in every step"""

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if not self.trainer.get("disable_dropout", True):
            raise UsageError(
                "trainer.disable_dropout=false: the KL compares two passes of one model, so dropout is off; remove it"
            )
        return self

    @property
    def adapters(self) -> tuple[int, int]:
        """The policy, and a frozen copy where the reference is computed in every step."""
        return (1, 0 if self.cache_reference else 1)


def kto(config: KtoConfig, run: Run) -> Trained:
    """Train a policy on good and bad answers against a frozen copy of itself."""
    from trl import KTOConfig, KTOTrainer

    from align.models.adapters import drop_reference, freeze_reference, start_policy
    from align.models.loading import Precision, switch_off_dropout
    from align.models.lora_starts import start_from_data
    from align.training.loop import train
    from align.training.reference import UNPAIRED, FirstStep, add_reference_logps
    from align.training.trl_bridge import build_trainer, trl_arguments

    # 1. Data: records seen as answers with a verdict; a pair gives two.
    run.data.read()

    # 2. Models: one base; the policy continues the start's adapter and the trainer freezes a copy of it as reference.
    loaded = start_policy(run.registry, run.parent, config.new_adapter, Precision.of(config))
    switch_off_dropout(loaded.model)
    data = run.data.tokenise(loaded.tokenizer)
    start_from_data(loaded, data.train)
    good, total = sum(data.train["label"]), len(data.train)
    weights = balance_weights(good, total - good, config)
    run.print_line(
        f"{good} good answers of weight {weights[0]:.3g}, {total - good} bad ones of weight {weights[1]:.3g}"
    )

    # 3. Optimise: TRL owns the loop, we own every argument it receives and the order of the rows.
    args = trl_arguments(KTOConfig, run, desirable_weight=weights[0], undesirable_weight=weights[1])
    data = data.map(lambda rows: add_mismatched(rows, config.per_device_train_batch_size, config.seed))
    trainer = build_trainer(KTOTrainer, loaded.model, loaded.tokenizer, args, data)
    freeze_reference(loaded)
    run.print_line(f"reference: a frozen copy of {run.parent.reference}; it equals the policy at step 0, so KL is 0")
    if config.cache_reference and loaded.starts_as_base:
        add_reference_logps(run, trainer, loaded.base, UNPAIRED)
        drop_reference(loaded.model)
    trainer.add_callback(FirstStep(run, first_numbers(config, *weights)))
    numbers = train(run, trainer)

    # 4. Hand back the policy's adapter; the reference is not kept.
    kept = select_metrics(numbers, "loss", "kl", "rewards/margins", "logps/chosen", "logps/rejected", "eval_loss")
    return Trained.of(loaded, config, metrics=kept, parents=[run.parent])


def balance_weights(good: int, bad: int, config: KtoConfig) -> tuple[float, float]:
    """Return the weights of good and bad answers: as asked, or such that the sums of both are equal.

    The paper (section 4.2) advises a ratio of the two sums between 1 and 4/3.
    """
    asked = (config.desirable_weight, config.undesirable_weight)
    if asked == (None, None):
        return max(good, bad) / max(good, 1), max(good, bad) / max(bad, 1)
    first, second = (1.0 if weight is None else weight for weight in asked)
    return first, second


def add_mismatched(rows: Dataset, batch_size: int, seed: int) -> Dataset:
    """Return shuffled rows, each with the completion of another prompt of its batch as `KL_completion_ids`.

    The KL of a batch is estimated on prompts whose completions were moved on by one, so the rows must be read in order.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    rows = rows.shuffle(seed=seed).flatten_indices()
    ids = rows["completion_ids"]
    starts = range(0, len(ids), batch_size)
    mismatched = [
        ids[start - 1 if row == start and start + 1 >= len(ids) else row - 1 if row > start else stop - 1]
        for start, stop in ((start, min(start + batch_size, len(ids))) for start in starts)
        for row in range(start, stop)
    ]
    return rows.add_column("KL_completion_ids", mismatched)


def first_numbers(config: KtoConfig, good: float, bad: float) -> dict[str, Expected]:
    """Return the numbers of step 1, when every log-ratio is 0: no KL, no rewards, half of one weight as loss.

    The KL is measured on answers of the same batch, so it is rounded like the log-probabilities of the good and the bad
    ones, of which a batch may have one kind only.
    """
    from align.training.reference import LOGPS, Expected, Rounding, expect_no_rewards

    rounding = Rounding.of(config)
    nats, share, exact = rounding
    expected = expect_no_rewards(config.beta, rounding)
    expected["kl"] = Expected(0.0, nats, share, LOGPS)
    if good == bad:
        # The slope of the sigmoid is at most 1/4, on the log-ratio and on the KL.
        within = 1e-5 * good + (0.0 if exact else good * config.beta * nats)
        expected["loss"] = Expected(good / 2, within, good * share * config.beta, LOGPS)
    return expected


STAGE = Stage(
    "kto", KtoConfig, kto, view="unpaired", produces="policy", trl_config="KTOConfig",
    next_command="align compare {name} {parent}",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
