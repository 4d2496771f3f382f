"""Reward modelling: a LoRA adapter with a score head that ranks chosen above rejected (Bradley and Terry 1952).

The loss is -log sigmoid(score(chosen) - score(rejected)), as in Ouyang et al. 2022, equation 1.
`align reward score REF FILE` scores a file of records with what came out.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from align.config import write
from align.peft_config import PeftStageConfig
from align.training import command
from align.training.stage import Stage, Trained, select_metrics
from align.tuners import Ability

if TYPE_CHECKING:
    from align.registry import Checkpoint
    from align.training.run import Run


class RewardConfig(PeftStageConfig):
    """Settings of reward modelling."""

    tuner_abilities: ClassVar[tuple[Ability, ...]] = ("score",)

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """peak learning rate"""
    center_rewards_coefficient: float | None = Field(None, ge=0)
    """weight of a term that keeps scores centred on zero (Eisenstein et al. 2023, eq. 2)"""


def reward(config: RewardConfig, run: Run) -> Trained:
    """Train a reward model on preference pairs."""
    from trl import RewardConfig as TrlRewardConfig
    from trl import RewardTrainer

    from align.evaluation.reward_report import report_held_out
    from align.models.heads import start_reward
    from align.models.loading import Precision, switch_off_dropout
    from align.models.lora_starts import start_from_data
    from align.training.loop import train
    from align.training.trl_bridge import build_trainer, trl_arguments

    # 1. Data: records seen as chosen and rejected answers to one prompt.
    run.data.read()

    # 2. Models: the start's base with a score head; a policy's adapter is continued, a base gets a new one.
    loaded = start_reward(run.registry, run.parent, config.new_adapter, Precision.of(config))
    run.print_line(describe_head(run.parent))
    if config.trainer.get("disable_dropout", True):
        switch_off_dropout(loaded.model)
    data = run.data.tokenise(loaded.tokenizer)
    start_from_data(loaded, data.train)

    # 3. Optimise: TRL owns the loop and finds its columns already tokenised.
    args = trl_arguments(TrlRewardConfig, run, max_length=None)
    trainer = build_trainer(RewardTrainer, loaded.model, loaded.tokenizer, args, data)
    numbers = train(run, trainer)

    # 4. Hand back adapter and head together, with what they make of the held-out pairs.
    report = report_held_out(loaded, data.held_out, 2 * config.per_device_train_batch_size)
    for message in report.messages:
        run.print_line(message)
    kept = select_metrics(numbers, "loss", "accuracy", "margin", "eval_loss", "eval_accuracy") | report.numbers
    return Trained.of(loaded, config, metrics=kept, parents=[run.parent], panels=report.panels)


def describe_head(start: Checkpoint) -> str:
    """Return a line on the score head that a run starts with, and its expected first loss."""
    if start.kind == "reward":
        return f"score head: continued from {start.reference} with its adapter; the first loss is what that had reached"
    adapter = f"the adapter is continued from {start.reference}" if start.is_adapter else "the adapter is new too"
    return f"score head: new ({adapter}); its scores mean nothing yet, so the first loss is near ln 2 = 0.693"


STAGE = Stage(
    "reward", RewardConfig, reward, view="preference", columns="joined", head="score", produces="reward",
    trl_config="RewardConfig",
    next_command="align ppo --model {parent} --reward_model {name} --data PROMPTS --name NAME{settings}",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train, or with `score` as the first word score a file; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["score"]:
        from align.evaluation import reward_score_file as score_file

        return score_file.main(words[1:])
    code = command.main(STAGE, words)
    if {"--help", "-h"} & set(words):
        write("align reward score REF FILE scores a file of records; see align reward score --help")
    return code


if __name__ == "__main__":
    sys.exit(main())
