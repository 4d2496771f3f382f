"""The settings of PPO, checked together before anything is loaded."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config import Scheduler, Settings, StageConfig
from align.errors import UsageError
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.rl.gold import GoldRewards

FREE_REWARD = [RewardSettings(name="length", args={"target": 20})]
"""the rewards of a trial: its time is that of the models"""

KlEstimator = Literal["k1", "k2", "k3"]
Whitened = Literal["scores", "rewards", "advantages"]


class SamplingSettings(Settings):
    """Sampling of completions while training."""

    temperature: float = Field(default=1.0, gt=0)
    """softmax temperature; policy, ratio and KL are those of the tempered distribution"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """sample from the smallest set of tokens with this probability; ratio, KL and entropy stay those of all tokens"""
    max_new_tokens: int = Field(default=128, ge=1)
    """tokens of a completion at most"""
    num_generations: int = Field(default=1, ge=1)
    """completions of each prompt"""
    batch_size: int | None = Field(default=None, ge=1)
    """completions sampled at a time; by default as many as need no more memory than the update does"""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """subtracted from the score of a completion that was cut before it stopped"""


class AdaptiveKlSettings(Settings):
    """The adaptive KL controller (Ziegler et al. 2019, 2.2)."""

    target: float | None = Field(default=None, gt=0)
    """target KL per completion in nats; none keeps kl_coef fixed"""
    horizon: int = Field(default=10000, ge=1)
    """completions over which kl_coef adapts"""


class ShapingSettings(Settings):
    """Reward shaping: normalising, clipping and whitening."""

    normalize_score: bool = False
    """scale scores to zero mean and unit variance over the run so far"""
    clip_score: float | None = Field(default=None, gt=0)
    """clip scores (after normalising) to plus and minus this; none does not"""
    kl_estimator: KlEstimator = "k1"
    """estimator of the KL that is logged and that adaptive_kl follows; the penalty is always k1"""
    whiten: list[Whitened] = Field(default=["advantages"])
    """scaled to unit variance over a rollout: scores, rewards, advantages"""


class PpoConfig(StageConfig):
    """Settings of proximal policy optimisation; a step is one rollout and the updates on it."""

    fragments_heap: ClassVar[bool] = False  # its passes give back to the system what they free (align.rl.malloc)

    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    """peak learning rate of policy and value model"""
    lr_scheduler_type: Scheduler = "linear"
    """schedule over rollouts, by its transformers name"""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """share of the rollouts spent warming up"""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """passes over the prompts"""
    max_steps: int = Field(default=-1, ge=-1)
    """rollouts; -1 lets num_train_epochs decide"""
    logging_steps: int = Field(default=1, ge=1)
    """rollouts between two lines of metrics.jsonl"""
    save_steps: int = Field(default=20, ge=0)
    """rollouts between two checkpoints; 0 saves none"""
    reward_model: str | None = None
    """a reward model: an adapter over the same base, or a whole classifier, which scores text"""
    rewards: list[RewardSettings] = Field(default=[])
    """rewards added to its score, or the only ones: [{name, file, weight, args}]"""
    gold: list[RewardSettings] = Field(default=[])
    """rewards that are logged as gold_mean beside the score and never trained on: [{name, file, args}]"""
    rollout_batch_size: int = Field(default=64, ge=1)
    """completions sampled in a step, by all ranks together"""
    sampling: SamplingSettings = SamplingSettings()
    """how completions are sampled"""
    num_ppo_epochs: int = Field(default=4, ge=1)
    """passes over a rollout"""
    kl_coef: float = Field(default=0.05, ge=0)
    """KL penalty coefficient"""
    adaptive_kl: AdaptiveKlSettings = AdaptiveKlSettings()
    """let kl_coef follow a target KL"""
    shaping: ShapingSettings = ShapingSettings()
    """reward shaping: the reward of a token is -kl_coef * KL, plus the score at the last token"""
    target_kl: float | None = Field(default=None, gt=0)
    """end a step's updates once the KL from the policy that sampled is above this; none never does"""
    cliprange: float = Field(default=0.2, gt=0)
    """the policy's ratio is clipped to 1 plus and minus this"""
    cliprange_value: float = Field(default=0.2, gt=0)
    """values are clipped to within this of the old ones"""
    value: Literal["adapter", "head"] = "adapter"
    """the value model: an adapter of its own, or a head on the policy, which needs less memory"""
    vf_coef: float = Field(default=0.1, ge=0)
    """weight of the value loss"""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """discount factor"""
    lam: float = Field(default=0.95, ge=0, le=1)
    """lambda of generalised advantage estimation"""

    @property
    def references(self) -> dict[str, str]:
        """The start, and the reward model if there is one, by setting."""
        return {"model": self.model} | ({"reward_model": self.reward_model} if self.reward_model else {})

    @property
    def token_length(self) -> int:
        """Tokens of the longest prompt: what the completion leaves."""
        return self.max_length - self.sampling.max_new_tokens

    @property
    def rows_per_step(self) -> int:
        """Prompts of one rollout."""
        return self.rollout_batch_size // self.sampling.num_generations

    @property
    def minibatch_size(self) -> int:
        """Completions of one rank in an optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def adapters(self) -> tuple[int, int]:
        """Numbers of adapters that are trained (policy, value model) and frozen (reference, reward model)."""
        return (2 if self.value == "adapter" else 1), (2 if self.reward_model else 1)

    @property
    def sampling_batch_size(self) -> int:
        """Completions whose KV cache is in memory at a time.

        A token's keys and values take about a ninth of the activations that its update keeps in a Llama, and about as
        much as these where activations are recomputed.
        """
        return self.sampling.batch_size or self.per_device_train_batch_size * (1 if self.gradient_checkpointing else 8)

    def for_trial(self, rows: int) -> Self:
        """Return the settings of a trial, with one pass over each rollout and a reward that costs nothing."""
        small = super().for_trial(rows)
        rollout = math.lcm(rows, self.sampling.num_generations)
        passes = {"rollout_batch_size": rollout, "num_ppo_epochs": 1, "max_steps": 2}
        return small.model_copy(update=passes | {"rewards": FREE_REWARD, "gold": []})

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not self.rewards and self.reward_model is None:
            raise UsageError("rewards: nothing to optimise; give reward_model=REF, rewards=[{name: ...}] or both")
        self.check_sizes(1)
        if self.sampling.max_new_tokens >= self.max_length:
            raise UsageError(
                f"sampling.max_new_tokens: {self.sampling.max_new_tokens} leaves no room for a prompt in "
                f"max_length={self.max_length}; lower the first or raise the second"
            )
        WeightedRewards(self.rewards)
        GoldRewards(self.gold)
        return self

    def check_sizes(self, ranks: int) -> None:
        """Raise UsageError unless a rollout is a number of whole minibatches and of whole groups."""
        minibatch = self.minibatch_size * ranks
        among = f" * {ranks} ranks" if ranks > 1 else ""
        if self.rollout_batch_size % minibatch:
            raise UsageError(
                f"rollout_batch_size: {self.rollout_batch_size} is no multiple of the minibatch, "
                f"per_device_train_batch_size * gradient_accumulation_steps{among} = {minibatch}; change one of them"
            )
        if self.rollout_batch_size % self.sampling.num_generations:
            raise UsageError(
                f"sampling.num_generations: {self.sampling.num_generations} completions a prompt do not fill "
                f"rollout_batch_size={self.rollout_batch_size} evenly; change one of them"
            )
