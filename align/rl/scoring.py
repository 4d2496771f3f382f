"""Scoring a rollout: one score a completion, and per token what the four models say of it before the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.rl.quartet import (
    POLICY,
    REWARD,
    VALUE,
    Quartet,
    active,
    completion_entropy,
    completion_logprobs,
    completion_scores,
    completion_values,
)

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.rewards import RewardSum
    from align.rl.rollout import Batch, Rollout
    from align.schema import Record


@dataclass(frozen=True)
class Observed:
    """What the models say of a rollout, each (B, T), without gradient."""

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    values: Tensor


@dataclass(frozen=True)
class Scores:
    """One score a completion (B,), the parts it is made of, and the completions as text."""

    total: Tensor
    parts: dict[str, list[float]]
    texts: list[str]


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the losses compare against; tensors are (B, T)."""

    rollout: Rollout
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor


def observe(quartet: Quartet, rollout: Rollout, size: int, temperature: float) -> Observed:
    """Log-probabilities of policy and reference, entropies and values, `size` rows a pass.

    The passes have the very rows and shapes of the first update's, so that its ratio is exactly 1.
    """

    def policy(batch: Batch) -> tuple[Tensor, ...]:
        return completion_entropy(quartet, batch, temperature)

    def reference(batch: Batch) -> tuple[Tensor, ...]:
        return (completion_logprobs(quartet, batch, temperature),)

    def value(batch: Batch) -> tuple[Tensor, ...]:
        return (completion_values(quartet, batch),)

    logprobs, entropy = _per_token(quartet, rollout, size, POLICY, policy)
    (ref_logprobs,) = _per_token(quartet, rollout, size, quartet.reference, reference)
    (values,) = _per_token(quartet, rollout, size, VALUE, value)
    return Observed(logprobs, entropy, ref_logprobs, values)


def _per_token(
    quartet: Quartet, rollout: Rollout, size: int, adapter: str | None, of: Callable[[Batch], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Run `of` over the rollout through one adapter and set its (b, t) parts together as (B, T), zero on padding."""
    import torch

    parts = []
    width = rollout.mask.shape[1]
    with torch.no_grad(), active(quartet, adapter):
        for index in torch.arange(len(rollout), device=rollout.mask.device).split(size):
            found = of(rollout.rows(index))
            parts.append([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in found])
    return [torch.cat(rows).masked_fill(rollout.mask == 0, 0.0) for rows in zip(*parts, strict=True)]


def score(
    quartet: Quartet, rollout: Rollout, records: Sequence[Record], rewards: RewardSum, size: int, eos_penalty: float
) -> Scores:
    """Score every completion once: the reward model's score, if there is one, plus the weighted rewards.

    A completion that was cut before it stopped loses `eos_penalty`.
    """
    import torch

    texts = completion_texts(quartet.resident.tokenizer, rollout)
    values = rewards.of(records, texts)
    total = torch.tensor([rewards.total(value) for value in values], device=rollout.mask.device)
    parts = {name: [value[name] for value in values] for name in rewards.names}
    if quartet.score_head is not None:
        learned = _learned_scores(quartet, rollout, size)
        total = total + learned
        parts["reward_model"] = learned.tolist()
    return Scores(total - eos_penalty * (~rollout.stopped), parts, texts)


def _learned_scores(quartet: Quartet, rollout: Rollout, size: int) -> Tensor:
    import torch

    rows = torch.arange(len(rollout), device=rollout.mask.device).split(size)
    with torch.no_grad(), active(quartet, REWARD):
        return torch.cat([completion_scores(quartet, rollout.rows(index)).float() for index in rows])


def completion_texts(tokenizer: Any, rollout: Rollout) -> list[str]:
    """The completions as text, without stop token and padding."""
    kept = [ids[:length] for ids, length in zip(rollout.completion_ids.tolist(), rollout.lengths.tolist(), strict=True)]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)
