"""Experience from a rollout: one score a completion, and the models' numbers per token before the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from align.rl.ppo_models import POLICY, REWARD, PpoModels, compute_policy, compute_scores, compute_values
from align.rl.rollout import BatchLayout, Rollout, build_layout, join_rows, micro_batches

if TYPE_CHECKING:
    from torch import Tensor

    from align.rewards.weighted_rewards import WeightedRewards
    from align.rl.ppo_settings import PpoConfig
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


class ScoredRollout(NamedTuple):
    """A rollout, its scores, and the models' numbers per token."""

    rollout: Rollout
    scores: RolloutScores
    logprobs: RolloutLogprobs


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the losses compare against; tensors are (B, T)."""

    rollout: Rollout
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor


def join_ranks(
    shards: Shards, block: int, rollout: Rollout, scores: Sequence[RolloutScores], logprobs: RolloutLogprobs
) -> ScoredRollout:
    """Return the rollouts of all ranks as one, in the order in which one process would have sampled it.

    `scores` are those of every rank already; `block` completions of each rank belong to one minibatch.
    """
    parts = shards.gather(lambda: (rollout, logprobs))
    order = shards.order(len(rollout), block)
    rollouts, all_logprobs = zip(*parts, strict=True)
    return ScoredRollout(join_rows(rollouts, order), join_rows(scores, order), join_rows(all_logprobs, order))


def first_update_batches(models: PpoModels, rollout: Rollout, config: PpoConfig) -> list[Tensor]:
    """Return the micro-batches in which the update first reads this rank's rollout.

    Scoring reads the very same ones: equal shapes give equal bits, so that the first ratio is exactly 1.
    """
    import torch

    blocks = torch.arange(len(rollout), device=rollout.mask.device).split(config.minibatch_size)
    size = config.per_device_train_batch_size
    return [batch for block in blocks for batch in micro_batches(rollout, block, size, packed=models.packed)]


def check_packed_rows(models: PpoModels, ids: Sequence[int], print_line: Callable[[str], None]) -> None:
    """Compare the policy's log-probs of a packed text with those of a padded one; where they differ, pad all rows."""
    import torch

    if not models.packed:
        kind = models.model.config.model_type
        print_line(
            f"rows are padded: this {kind} model takes no packed ones, by its family, its head or its attention window"
        )
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
    values = None
    if reuse_sampler_logprobs and models.value != POLICY:
        assert rollout.logprobs is not None
        assert rollout.entropy is not None
        policy, entropy = rollout.logprobs, rollout.entropy
    else:
        policy, entropy, *rest = _per_token(
            models, rollout, batches, POLICY, lambda layout: compute_policy(models, layout, temperature)
        )
        values = rest[0] if rest else None
    reference = _per_token(
        models, rollout, batches, models.reference, lambda layout: compute_policy(models, layout, temperature)
    )[0]
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
    import torch

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
    import torch

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
    import torch

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
