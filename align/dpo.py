"""Direct preference optimisation: move a policy towards chosen completions (Rafailov et al. 2023, equation 7).

The reference is always a frozen copy of what the policy starts as, so the first loss is ln 2.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.config import TrainerStageConfig
from align.training.stage import Stage, Trained, keep, main

if TYPE_CHECKING:
    from align.training.run import Run

LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop",
]  # fmt: skip


class DpoConfig(TrainerStageConfig):
    """Settings of direct preference optimisation."""

    learning_rate: float = Field(5e-6, gt=0, le=1)
    """peak learning rate"""
    beta: float = Field(0.1, gt=0)
    """how strongly the policy is held to its reference"""
    loss_type: LossType = "sigmoid"
    """loss on the margin, by its TRL name"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """share of pairs assumed to be labelled the wrong way round"""


def dpo(config: DpoConfig, run: Run) -> Trained:
    """Train a policy on preference pairs against a frozen copy of itself."""
    from trl import DPOConfig, DPOTrainer

    from align.models.adapters import prove_frozen_copy, start_policy, unrounded
    from align.models.dropout import switch_off_dropout
    from align.models.loading import Precision
    from align.training.arguments import trl_arguments
    from align.training.datasets import stand_in, token_sets

    # 1. Data: records seen as chosen and rejected answers to one prompt.
    records = run.records()
    held_out = run.held_out(records)

    # 2. Models: one base; the policy continues the start's adapter and the trainer freezes a copy of it as reference.
    resident = start_policy(run.registry, run.parent, config.lora, Precision.of(config))
    if config.trainer.get("disable_dropout", True):
        switch_off_dropout(resident.model)
    train_set, eval_set = token_sets(run, records, held_out, resident.tokenizer)

    # 3. Optimise: TRL owns the loop. It would tokenise rows itself, so it is built on a stand-in and given ours after.
    with unrounded(resident.model):
        trainer = DPOTrainer(
            model=resident.model,
            args=trl_arguments(
                DPOConfig, config, run, max_length=None, beta=config.beta, loss_type=[config.loss_type],
                label_smoothing=config.label_smoothing,
            ),
            train_dataset=stand_in(),
            eval_dataset=stand_in() if eval_set is not None else None,
            processing_class=resident.tokenizer,
        )  # fmt: skip
    trainer.train_dataset, trainer.eval_dataset = train_set, eval_set
    prove_frozen_copy(resident.model, "default", "ref")
    run.say(f"reference: a frozen copy of {run.parent.reference}; it equals the policy at step 0, so KL is 0")
    numbers = run.train(trainer)

    # 4. Hand back the policy's adapter; the reference is not kept.
    kept = keep(numbers, *_KEPT)
    return Trained(resident.model, resident.tokenizer, resident.base, metrics=kept, parents=[run.parent])


_KEPT = (
    "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "eval_loss",
    "eval_rewards/accuracies", "eval_rewards/margins",
)  # fmt: skip

STAGE = Stage(
    "dpo", DpoConfig, dpo, view="preference", produces="policy", trl_config="DPOConfig",
    next_command="python -m align.compare {name} {parent}",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
