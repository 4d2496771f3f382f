"""Group-relative policy optimisation: a completion's advantage is relative to its group's (Shao et al. 2024).

There is no value model: A_i = (r_i - mean(r)) / std(r) over the completions of one prompt (section 4.1.2, equation 3 is
the objective). TRL owns the loop; the reference, with beta above 0, is a frozen copy of what the policy starts as.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from align.errors import UsageError
from align.rewards import RewardContext
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.rl.ppo_settings import FREE_REWARD
from align.rl.vllm_settings import VllmStageConfig, check_vllm, vllm_arguments
from align.training.command import main
from align.training.stage import Stage, Trained, select_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

    from align.models.adapters import LoadedBase
    from align.training.reference import Expected
    from align.training.run import Run

LossType = Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]

_REFUSED = {
    "shuffle_dataset": "the order of the prompts follows from seed; remove it",
    "generation_batch_size": "give steps_per_generation instead",
    "reward_weights": "give each of rewards its weight",
    "log_completions": "samples.jsonl in the run's folder holds completions; remove it",
    "chat_template_kwargs": "prompts are rendered by align.data; remove it",
}
"""settings of TRL's config that would have no effect here, or another one than documented"""


class GrpoConfig(VllmStageConfig):
    """Settings of group-relative policy optimisation."""

    learning_rate: float = Field(1e-5, gt=0, le=1)
    """peak learning rate"""
    rewards: list[RewardSettings] = Field(min_length=1)
    """rewards whose weighted sum scores a completion: [{name, file, weight, args}]"""
    num_generations: int = Field(8, ge=2)
    """completions sampled for a prompt: the group"""
    temperature: float = Field(1.0, gt=0)
    """softmax temperature; the policy that is trained is the tempered one"""
    top_p: float = Field(1.0, gt=0, le=1)
    """sample from the smallest set of tokens with this probability; 1 samples from all"""
    max_completion_length: int = Field(512, ge=1)
    """tokens of a completion at most; max_length less these is what a prompt may have"""
    beta: float = Field(0.0, ge=0)
    """KL penalty coefficient; with 0 there is no reference"""
    epsilon: float = Field(0.2, gt=0)
    """the policy's ratio is clipped to 1 plus and minus this"""
    loss_type: LossType = "dapo"
    """normalisation of the token losses, by its TRL name"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """divide advantages by the standard deviation of the rewards of their group or batch, or not at all"""
    num_iterations: int = Field(1, ge=1)
    """passes over a rollout"""

    @property
    def token_length(self) -> int:
        """Tokens of the longest prompt: max_length less max_completion_length."""
        return self.max_length - self.max_completion_length

    @property
    def passes_per_rollout(self) -> int:
        """Forward batches of one pass over a rollout's completions."""
        steps = self.trainer.get("steps_per_generation")
        return self.gradient_accumulation_steps if steps is None else steps

    @property
    def save_unit(self) -> int:
        """Optimiser steps from one rollout boundary to the next."""
        passes = self.passes_per_rollout * self.num_iterations
        return passes // math.gcd(passes, self.gradient_accumulation_steps)

    @property
    def prompts_per_unit(self) -> int:
        """Prompts of one rank between two rollout boundaries."""
        rollouts = self.save_unit * self.gradient_accumulation_steps // (self.passes_per_rollout * self.num_iterations)
        return rollouts * self.per_device_train_batch_size * self.passes_per_rollout // self.num_generations

    @property
    def rows_per_step(self) -> int:
        """Prompts in an optimiser step."""
        return max(1, self.prompts_per_unit // self.save_unit)

    def for_trial(self, rows: int) -> Self:
        """Return the settings of a trial of one group of completions a step, with a reward that costs nothing."""
        small = super().for_trial(self.num_generations)
        trainer = {key: value for key, value in self.trainer.items() if key != "steps_per_generation"}
        changes = {"rewards": FREE_REWARD, "num_iterations": 1, "max_steps": 2, "trainer": trainer}
        return small.model_copy(update=changes)

    @model_validator(mode="before")
    @classmethod
    def _refuse_reward_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("reward_model") is not None:
            raise UsageError(
                f"reward_model: found {values['reward_model']}, and GRPO has no adapter for it on its base; give "
                f"rewards=[{{name: learned, args: {{model: {values['reward_model']}}}}}], or train on a reward model "
                "with align ppo"
            )
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for key in _REFUSED.keys() & self.trainer.keys():
            raise UsageError(f"trainer.{key}: not a setting of this stage; {_REFUSED[key]}")
        passes = self.passes_per_rollout
        if not isinstance(passes, int) or passes < 1:
            raise UsageError(f"trainer.steps_per_generation: expected a whole number above 0, found {passes!r}")
        completions = self.per_device_train_batch_size * passes
        if completions % self.num_generations:
            is_default = self.trainer.get("steps_per_generation") is None
            other = "gradient_accumulation_steps" if is_default else "trainer.steps_per_generation"
            raise UsageError(
                f"num_generations: {self.num_generations} does not divide the completions of a rollout, "
                f"per_device_train_batch_size * {other} = {completions}; groups must be whole, so change one of them"
            )
        if self.max_completion_length >= self.max_length:
            raise UsageError(
                f"max_completion_length: {self.max_completion_length} leaves no room for a prompt in "
                f"max_length={self.max_length}; lower the first or raise the second"
            )
        WeightedRewards(self.rewards)
        return self


def grpo(config: GrpoConfig, run: Run) -> Trained:
    """Train a policy on how its completions of one prompt score beside each other."""
    from trl import GRPOConfig, GRPOTrainer

    from align.models.adapters import prove_frozen_copy, start_policy
    from align.models.loading import Precision, switch_off_dropout
    from align.rl.grpo_rewards import reward_functions
    from align.rl.rollout_log import time_rollouts
    from align.training.loop import train
    from align.training.reference import FirstStep
    from align.training.training_data import TokenisedSplits
    from align.training.trl_bridge import build_trainer, trl_arguments

    check_vllm(config, run.registry.resolve_base(run.parent).location)
    # 1. Data: records seen as prompts; rewards may read the rest of a record.
    records = run.data.train.records
    rewards = WeightedRewards(config.rewards)
    rewards.check(records)
    reward_parents = rewards.load(RewardContext(run.registry, Precision.of(config), run.print_line))

    # 2. Models: one base; the policy continues the start's adapter and the trainer freezes a copy of it as reference.
    loaded = start_policy(run.registry, run.parent, config.lora, Precision.of(config))
    switch_off_dropout(loaded.model)
    stops = _set_stop_tokens(loaded, run.print_line)
    rows = run.data.tokenise(loaded.tokenizer).train

    # 3. Optimise: TRL owns the loop; prompts go in as our tokens, in an order that resumes from any checkpoint.
    prompts, steps = _order_prompts(config, run, rows)
    samples = run.folder if run.ranks.is_rank_zero else None
    args = trl_arguments(
        GRPOConfig, run, max_steps=steps, num_train_epochs=1, shuffle_dataset=False,
        save_steps=_save_steps(config, run), reward_weights=[reward.weight for reward in config.rewards],
        **vllm_arguments(config, stops),
    )  # fmt: skip
    trainer = build_trainer(
        GRPOTrainer, loaded.model, loaded.tokenizer, args, TokenisedSplits(prompts),
        reward_funcs=reward_functions(rewards, records, samples, loaded.tokenizer),
    )  # fmt: skip
    # Prompts are tokens already; it would render and tokenise texts itself.
    trainer._tokenize_prompts = lambda prompts: (prompts, None, {})
    time_rollouts(trainer)
    if config.beta:
        prove_frozen_copy(loaded.model, "default", "ref")
        what = f"a frozen copy of {run.parent.reference}"
        run.print_line(f"reference: {what}; it equals the policy at step 0, so KL is 0")
        trainer.add_callback(FirstStep(run, first_numbers(config)))
    with warnings.catch_warnings():
        # TRL toggles gradient checkpointing around every rollout, under deprecated names.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_(en|dis)able` is deprecated", FutureWarning)
        numbers = train(run, trainer)
    if numbers.get("frac_reward_zero_std") == 1:
        run.print_line(
            "warning: at the end all completions of every group scored the same, and nothing is learned from such "
            "groups; raise num_generations or temperature, or take rewards that tell completions apart"
        )

    # 4. Hand back the policy's adapter; the reference is not kept.
    means = [f"rewards/{name}/mean" for name in rewards.names]
    kept = select_metrics(numbers, "loss", "reward", "reward_std", *means, "kl")
    return Trained.of(loaded, config, metrics=kept, parents=[run.parent, *reward_parents])


def _set_stop_tokens(loaded: LoadedBase, print_line: Callable[[str], None]) -> list[int]:
    """End completions at every stop token, drop the model's other generation defaults, and return the tokens."""
    from transformers import GenerationConfig

    from align.models.tokenizers import find_stop_ids

    stops = find_stop_ids(loaded, print_line)
    loaded.model.get_base_model().generation_config = GenerationConfig(eos_token_id=stops)
    return stops


def _order_prompts(config: GrpoConfig, run: Run, rows: Dataset) -> tuple[Dataset, int]:
    """Return the prompts in the order of the whole run, reshuffled every epoch, and its optimiser steps.

    TRL's sampler shuffles with a generator that no checkpoint holds, so a resumed second epoch would repeat the first.
    """
    from align.rl.rollout import PromptStream, count_rollouts

    size = config.prompts_per_unit * run.ranks.world_size
    units = count_rollouts(len(rows), size, config.num_train_epochs, math.ceil(config.max_steps / config.save_unit))
    order = PromptStream(len(rows), config.seed).take(units * size)
    steps = config.max_steps if config.max_steps > 0 else units * config.save_unit
    return rows.select(order).rename_column("prompt_ids", "prompt"), steps


def _save_steps(config: GrpoConfig, run: Run) -> int:
    """`save_steps`, raised to the next rollout boundary: a rollout in use is in no checkpoint."""
    if not config.save_steps:
        return 500
    steps = math.ceil(config.save_steps / config.save_unit) * config.save_unit
    if steps != config.save_steps:
        run.print_line(
            f"save_steps={config.save_steps}: a rollout lasts {config.save_unit} steps, so every {steps} are saved"
        )
    return steps


def first_numbers(config: GrpoConfig) -> dict[str, Expected]:
    """Return the numbers that step 1 logs when policy and reference are equal: KL 0.

    A token's KL is half the square of the rounding difference of two log-probabilities.
    """
    from align.training.reference import Expected, Rounding

    return {"kl": Expected(0.0, 1e-6 if Rounding.of(config).exact else 1e-2)}


STAGE = Stage(
    "grpo", GrpoConfig, grpo, view="prompt", produces="policy", trl_config="GRPOConfig",
    next_command="align compare {name} {parent}",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
