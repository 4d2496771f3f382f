"""Direct preference optimisation: move a policy towards chosen completions (Rafailov et al. 2023, equation 7).

The reference is always a frozen copy of what the policy starts as, so the first loss is ln 2; step 1 proves it.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.errors import UsageError
from align.peft_config import PeftStageConfig
from align.training.command import main
from align.training.stage import Stage, Trained, select_metrics
from align.tuners import Ability

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase
    from align.training.reference import Expected
    from align.training.run import Run

LossType = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip

_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""the losses that use label_smoothing, the first two as a divisor or in a logarithm"""
_WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""the losses for which another f-divergence than reverse KL is defined (Wang et al. 2023)"""
_MAX_FALL_RATIO = 0.1
"""share of their log-probability that chosen answers may lose before a line warns about it"""


class DpoConfig(PeftStageConfig):
    """Settings of direct preference optimisation."""

    tuner_abilities: ClassVar[tuple[Ability, ...]] = ("copy",)

    learning_rate: float = Field(5e-6, gt=0, le=1)
    """peak learning rate"""
    beta: float = Field(0.1, gt=0)
    """how strongly the policy is held to its reference"""
    loss_type: list[LossType] = Field(["sigmoid"], min_length=1)
    """loss on the margin, by its TRL name, or several that are added up, such as [sigmoid, sft]"""
    loss_weights: list[float] | None = None
    """weight of each loss, such as [1.0, 0.1]; by default 1"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """share of pairs assumed to be labelled the wrong way round (robust, exo_pair, aot, aot_unpaired)"""
    adapter: Literal["continue", "stack"] = "continue"
    """train the start's own adapter on, or a new one (lora) beside it; both are registered as one adapter"""
    cache_reference: bool = True
    """compute the reference's log-probabilities once and keep them, instead of in every step"""

    @property
    def fresh_adapter(self) -> bool:
        """True when a new adapter is trained beside the start's own."""
        return self.adapter == "stack"

    @property
    def adapters(self) -> tuple[int, int]:
        """The policy, and a frozen copy where the reference is computed in every step."""
        return (1, 0 if self.cache_reference or self.fresh_adapter else 1)

    @field_validator("loss_type", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _losses_go_together(self) -> Self:
        weights, kinds = self.loss_weights, set(self.loss_type)
        if weights is not None and (len(weights) != len(self.loss_type) or min(weights, default=0) <= 0):
            raise UsageError(
                f"loss_weights: {weights} for loss_type {self.loss_type}; give one weight above 0 for each loss"
            )
        if self.label_smoothing and not kinds & _SMOOTHED:
            raise UsageError(
                f"label_smoothing={self.label_smoothing:g}: {', '.join(self.loss_type)} has none; set it to 0, or use "
                f"one of {', '.join(sorted(_SMOOTHED))}"
            )
        for kind, example in (("robust", "0.1"), ("exo_pair", "1e-3")):
            if kind in kinds and not self.label_smoothing:
                raise UsageError(
                    f"loss_type={kind}: label_smoothing is 0, for which this loss is not defined or plain sigmoid; "
                    f"give label_smoothing={example}"
                )
        return self

    @model_validator(mode="after")
    def _passed_on_settings_fit_the_loss(self) -> Self:
        kinds = set(self.loss_type)
        divergence = self.trainer.get("f_divergence_type", "reverse_kl")
        if divergence != "reverse_kl" and not kinds <= _WITH_DIVERGENCE:
            raise UsageError(
                f"trainer.f_divergence_type={divergence}: not defined for {', '.join(sorted(kinds - _WITH_DIVERGENCE))}"
                f"; use one of {', '.join(sorted(_WITH_DIVERGENCE))}"
            )
        if self.trainer.get("use_weighting") and kinds & {"aot", "aot_unpaired"}:
            raise UsageError(
                "trainer.use_weighting: aot sorts its pairs, so they have no weights; use another loss_type"
            )
        return self


def dpo(config: DpoConfig, run: Run) -> Trained:
    """Train a policy on preference pairs against a frozen copy of itself."""
    from trl import DPOConfig, DPOTrainer

    from align.models.adapters import start_policy
    from align.models.loading import Precision, switch_off_dropout
    from align.models.lora_starts import start_from_data
    from align.training.loop import train
    from align.training.reference import FirstStep
    from align.training.trl_bridge import build_trainer, trl_arguments

    # 1. Data: records seen as chosen and rejected answers to one prompt.
    run.data.read()

    # 2. Models: one base; the policy continues the start's adapter, or is a new one beside it.
    precision, fresh = Precision.of(config), config.fresh_adapter
    loaded = start_policy(run.registry, run.parent, config.new_adapter, precision, fresh=fresh)
    if config.trainer.get("disable_dropout", True):
        switch_off_dropout(loaded.model)
    data = run.data.tokenise(loaded.tokenizer)
    start_from_data(loaded, data.train)

    # 3. Optimise: TRL owns the loop, we own every argument it receives.
    args = trl_arguments(DPOConfig, run, max_length=None)
    trainer = build_trainer(DPOTrainer, loaded.model, loaded.tokenizer, args, data)
    _set_reference(config, run, trainer, loaded)
    if config.trainer.get("disable_dropout", True):
        trainer.add_callback(FirstStep(run, first_numbers(config)))
    numbers = train(run, trainer)
    if (fall := describe_fall_of_chosen(config.beta, numbers)) is not None:
        run.print_line(fall)

    # 4. Hand back the policy's adapter (a stack is saved as one); the reference is not kept.
    return Trained.of(loaded, config, metrics=select_metrics(numbers, *_METRICS), parents=[run.parent])


def _set_reference(config: DpoConfig, run: Run, trainer: Any, loaded: LoadedBase) -> None:
    """Freeze the adapter `ref`, prove that it equals the policy, and cache its log-probabilities if possible."""
    from align.models.adapters import attach_beside, drop_reference, freeze_reference
    from align.models.loading import switch_off_dropout
    from align.models.lora_starts import prove_fresh
    from align.training.reference import PAIRS, add_reference_logps

    if config.fresh_adapter:
        attach_beside(loaded, run.parent)
        if config.trainer.get("disable_dropout", True):
            switch_off_dropout(loaded.model)
        prove_fresh(loaded.model)
        what = f"{run.parent.reference} itself, frozen beside the new adapter"
    else:
        freeze_reference(loaded)
        what = f"a frozen copy of {run.parent.reference}"
    run.print_line(f"reference: {what}; it equals the policy at step 0, so KL is 0")
    # With these the reference's number of a row is not one sum, or not the same twice.
    moving = [key for key in ("ld_alpha", "disable_dropout") if config.trainer.get(key) is not None]
    if moving and config.cache_reference:
        run.print_line(f"reference: not cached, because trainer.{moving[0]} is set; it is computed in every step")
    elif config.cache_reference and not loaded.starts_as_base:
        run.print_line("reference: not cached, because the new adapter does not start as the base")
    elif config.cache_reference:
        add_reference_logps(run, trainer, loaded.base, PAIRS)
        if not config.fresh_adapter:
            drop_reference(loaded.model)


def first_numbers(config: DpoConfig) -> dict[str, Expected]:
    """Return the numbers of step 1, when every log-ratio is 0: no rewards, and a known loss for each type."""
    from align.training.reference import LOGPS, Expected, Rounding, expect_no_rewards

    rounding = Rounding.of(config)
    nats, share, exact = rounding
    expected = expect_no_rewards(config.beta, rounding)
    losses = [first_loss(kind, config.beta, config.label_smoothing) for kind in config.loss_type]
    weights = config.loss_weights or [1.0] * len(losses)
    if None not in losses and not config.trainer.keys() & {"use_weighting", "router_aux_loss_coef"}:
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if loss is not None)
        # What a nat can move: the two losses with a target margin are parabolas whose slope there is of order 1 / beta.
        steep = {"ipo", "sppo_hard"} & {*config.loss_type}
        slope = 4 * sum(weights) * (max(config.beta, 1 / config.beta) if steep else config.beta)
        within = 1e-5 * max(1.0, total) + (0.0 if exact else slope * nats)
        expected["loss"] = Expected(total, within, slope * share, LOGPS)
    return expected


def first_loss(kind: LossType, beta: float, smoothing: float) -> float | None:
    """Return the loss of one type when policy and reference are equal; None for `sft`, which has no reference."""
    if kind == "exo_pair":
        return -math.log(2) - math.log(smoothing * (1 - smoothing)) / 2
    losses: dict[LossType, float | None] = {
        "sft": None, "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0, "ipo": 1 / (4 * beta**2),
        "sppo_hard": 1 / (2 * beta**2), "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2),
        "discopop": (1 + math.log(2)) / 2,
    }  # fmt: skip
    return losses.get(kind, math.log(2))


def describe_fall_of_chosen(beta: float, numbers: dict[str, float]) -> str | None:
    """Return a warning when chosen answers became much less likely, of held-out ones where there are any.

    The mean reward over beta is exactly the change since the start, on the same rows.
    """
    prefix, which = ("eval_", "held-out chosen") if "eval_rewards/chosen" in numbers else ("", "chosen")
    now, reward = numbers.get(f"{prefix}logps/chosen"), numbers.get(f"{prefix}rewards/chosen")
    if now is None or reward is None:
        return None
    lost, before = -reward / beta, abs(now - reward / beta)
    if lost <= max(1.0, _MAX_FALL_RATIO * before):
        return None
    return (
        f"warning: {which} answers became less likely, by {lost:.3g} nats from -{before:.3g}; DPO permits it while "
        "rejected ones lose more; if the model gets worse, add likelihood (loss_type=[sigmoid,sft] "
        "loss_weights=[1,0.1]), lower learning_rate or raise beta"
    )


_METRICS = (
    "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "eval_loss",
    "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "eval_logps/rejected",
)  # fmt: skip

STAGE = Stage(
    "dpo", DpoConfig, dpo, view="preference", produces="policy", trl_config="DPOConfig",
    next_command="align compare {name} {parent}",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
