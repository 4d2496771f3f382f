"""Experience from a rollout: one score a completion, and the models' numbers per token before the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.rewards.weighted_rewards import WeightedRewards
from align.rl.maths import gae, kl_per_token, shape_scores, token_rewards, whiten
from align.rl.ppo_models import (
    POLICY,
    REWARD,
    BatchLayout,
    PolicyOutput,
    PpoModels,
    build_layout,
    compute_policy,
    compute_scores,
    compute_values,
    micro_batches,
)
from align.rl.ppo_settings import PpoConfig
from align.rl.ppo_state import PpoState
from align.rl.rollout import Rollout, join_rows
from align.rl.shards import Shards
from align.schema import Record

_TOLERANCE, _TOLERANCE_ROUNDED = 1e-4, 5e-2
"""relative difference of log-probabilities that rounding explains, in single precision and in less"""


@dataclass(frozen=True)
class RolloutLogprobs:
    """Log-probs of the sampled tokens, entropies and values, each (B, T), zero on padding, without gradient."""

    policy: Tensor
    entropy: Tensor
    reference: Tensor
    values: Tensor


@dataclass(frozen=True)
class RolloutScores:
    """One score a completion (B,), the penalty on it (B,), its parts, and the completions as text."""

    raw: Tensor
    penalty: Tensor
    parts: dict[str, list[float]]
    texts: list[str]

    @property
    def total(self) -> Tensor:
        """The scores (B,) less the penalty."""
        return self.raw - self.penalty


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the losses compare against; tensors are (B, T)."""

    rollout: Rollout
    scores: RolloutScores
    logprobs: RolloutLogprobs
    advantages: Tensor
    returns: Tensor
    kl: Tensor


def join_ranks(
    shards: Shards, block: int, rollout: Rollout, scores: Sequence[RolloutScores], logprobs: RolloutLogprobs
) -> tuple[Rollout, RolloutScores, RolloutLogprobs]:
    """Return the rollouts of all ranks as one, in the order in which one process would have sampled it.

    `scores` are those of every rank already; `block` completions of each rank belong to one minibatch.
    """
    parts = shards.gather(lambda: (rollout, logprobs))
    order = shards.order(len(rollout), block)
    rollouts, all_logprobs = zip(*parts, strict=True)
    return join_rows(rollouts, order), join_rows(scores, order), join_rows(all_logprobs, order)


def first_update_batches(models: PpoModels, rollout: Rollout, config: PpoConfig) -> list[Tensor]:
    """Return the micro-batches in which the update first reads this rank's rollout.

    Scoring reads the very same ones: equal shapes give equal bits, so that the first ratio is exactly 1.
    """
    blocks = torch.arange(len(rollout), device=rollout.mask.device).split(config.minibatch_size)
    size = config.per_device_train_batch_size
    return [batch for block in blocks for batch in micro_batches(rollout, block, size, packed=models.packed)]


def check_packed_rows(models: PpoModels, ids: Sequence[int], print_line: Callable[[str], None]) -> None:
    """Compare the policy's log-probs of a packed text with those of a padded one; where they differ, pad all rows."""
    if not models.packed:
        what = f"this {models.model.config.model_type} model takes no packed ones"
        print_line(f"rows are padded: {what}, by its family, its head or its attention window")
        return
    middle = len(ids) // 2
    text = torch.tensor([list(ids), [0] * middle + list(ids)[: len(ids) - middle]], device=models.model.device)
    mask = torch.ones_like(text)
    mask[1, :middle] = 0
    answer = text.flip(1)[:, : middle + 1]
    rollout = Rollout(text, mask, answer, torch.ones_like(answer).float(), torch.ones(2, dtype=torch.bool))
    rows = torch.arange(2, device=text.device)
    with torch.no_grad(), models.active(POLICY):
        packed, padded = (
            compute_policy(models, build_layout(rollout, rows, packed=way), 1.0).logprobs for way in (True, False)
        )
    difference = float(((packed - padded).abs() / (1 + padded.abs())).max())
    if difference > (_TOLERANCE if models.exact else _TOLERANCE_ROUNDED):
        models.packed = False
        print_line(f"rows are padded: log-probs of a packed text differ from a padded one's by {difference:.1e}")


def compute_logprobs(
    models: PpoModels,
    rollout: Rollout,
    batches: Sequence[Tensor],
    temperature: float,
    *,
    reuse_sampler_logprobs: bool = False,
) -> RolloutLogprobs:
    """Return log-probs of policy and reference, entropies and values, one forward pass for each of the batches.

    With `reuse_sampler_logprobs` the policy's are those of sampling, and its forward pass runs only for values, if its
    adapter has the value head.
    """

    def compute(layout: BatchLayout) -> PolicyOutput:
        return compute_policy(models, layout, temperature)

    values = None
    if reuse_sampler_logprobs and models.value != POLICY:
        assert rollout.logprobs is not None
        assert rollout.entropy is not None
        policy, entropy = rollout.logprobs, rollout.entropy
    else:
        policy, entropy, *rest = _per_token(models, rollout, batches, POLICY, compute)
        values = rest[0] if rest else None
    reference = _per_token(models, rollout, batches, models.reference, compute)[0]
    if values is None:
        (values,) = _per_token(models, rollout, batches, models.value, lambda layout: [compute_values(models, layout)])
    return RolloutLogprobs(policy, entropy, reference, values)


def _per_token(
    models: PpoModels,
    rollout: Rollout,
    batches: Sequence[Tensor],
    adapter: str | None,
    compute: Callable[[BatchLayout], Sequence[Tensor | None]],
) -> list[Tensor]:
    """Compute the batches through one adapter and return their (b, t) tensors as (B, T), zero on padding."""
    whole: list[Tensor] = []
    with torch.no_grad(), models.active(adapter):
        for index in batches:
            layout = build_layout(rollout, index, packed=models.packed)
            parts = [part for part in compute(layout) if part is not None]
            whole = whole or [part.new_zeros(rollout.mask.shape) for part in parts]
            for into, part in zip(whole, parts, strict=True):
                into[index, : part.shape[1]] = part
    return whole


def score_rollout(
    models: PpoModels,
    rollout: Rollout,
    records: Sequence[Record],
    rewards: WeightedRewards,
    batches: Sequence[Tensor],
    eos_penalty: float,
) -> RolloutScores:
    """Score every completion once: the reward model's score, if there is one, plus the weighted rewards.

    A completion that was cut before it stopped loses `eos_penalty`.
    """
    texts = completion_texts(models.loaded.tokenizer, rollout)
    values = rewards.score_all(records, texts)
    total = torch.tensor([rewards.total(value) for value in values], device=rollout.mask.device)
    parts = {name: [value[name] for value in values] for name in rewards.names}
    if models.score_head is not None:
        learned = compute_reward_model_scores(models, rollout, batches)
        total = total + learned
        parts["reward_model"] = learned.tolist()
    return RolloutScores(total, eos_penalty * (~rollout.stopped).to(total), parts, texts)


def compute_reward_model_scores(models: PpoModels, rollout: Rollout, batches: Sequence[Tensor]) -> Tensor:
    """Return the reward model's score (B,) of each completion, one forward pass for each of the batches."""
    scores = torch.zeros(len(rollout), device=rollout.mask.device)
    with torch.no_grad(), models.active(REWARD):
        for index in batches:
            scores[index] = compute_scores(models, build_layout(rollout, index, packed=models.packed))
    return scores


def completion_texts(tokenizer: Any, rollout: Rollout) -> list[str]:
    """Return the completions as text, without stop token and padding; reasoning is between <think> and </think>."""
    from align.data.reasoning import mark_reasoning

    pairs = zip(rollout.prompts, rollout.completions, strict=True)
    return [mark_reasoning(tokenizer, prompt, completion) for prompt, completion in pairs]


def compute_advantages(
    config: PpoConfig, state: PpoState, rollout: Rollout, scores: RolloutScores, logprobs: RolloutLogprobs
) -> Experience:
    """Turn scores and KL into per-token rewards and these into advantages; update the running score statistics.

    Reward of a token: -kl_coef * KL, plus the score at the last token (Ziegler et al. 2019, eq. 2).
    """
    shaping, mask = config.shaping, rollout.mask
    state.scores = state.scores.after(scores.raw)
    moments = state.scores if shaping.normalize_score else None
    shaped = shape_scores(scores.raw, moments, shaping.clip_score, whitened="scores" in shaping.whiten)
    # As a reward only k1 holds the policy: the gradient of the others vanishes where the policy is the reference.
    penalty = kl_per_token(logprobs.policy, logprobs.reference, "k1")
    kl = kl_per_token(logprobs.policy, logprobs.reference, shaping.kl_estimator)
    rewards = token_rewards(shaped - scores.penalty, penalty, mask, state.kl_coef)
    if "rewards" in shaping.whiten:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, logprobs.values, mask, config.gamma, config.lam)
    if "advantages" in shaping.whiten:
        advantages = whiten(advantages, mask)
    return Experience(rollout, scores, logprobs, advantages, returns, kl)
