"""Scoring a rollout: one score a completion, and per token what the models say of it before the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from align.rl.batch_layout import Layout, lay_out, micro_batches
from align.rl.ppo_models import POLICY, REWARD, Quartet, active, read_policy, read_scores, read_values
from align.rl.rollout import Rollout, stack

if TYPE_CHECKING:
    from torch import Tensor

    from align.rewards.weighted_sum import RewardSum
    from align.rl.ppo_settings import PpoConfig
    from align.rl.shards import Shards
    from align.schema import Record

_CLOSE, _CLOSE_ROUNDED = 1e-4, 5e-2
"""relative difference of log-probabilities that rounding explains, in single precision and in less"""


@dataclass(frozen=True)
class Observed:
    """What the models say of a rollout, each (B, T), zero on padding, without gradient."""

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    values: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Observed], order: Sequence[int]) -> Observed:
        """Those of several rollouts as one, their rows one after the other and then in this order."""
        columns = zip(*((part.logprobs, part.entropy, part.ref_logprobs, part.values) for part in parts), strict=True)
        return cls(*(stack(column, order) for column in columns))


@dataclass(frozen=True)
class Scores:
    """One score a completion (B,), what is taken off it (B,), its parts, and the completions as text."""

    raw: Tensor
    penalty: Tensor
    parts: dict[str, list[float]]
    texts: list[str]

    @property
    def total(self) -> Tensor:
        """The scores (B,) with the penalty taken off."""
        return self.raw - self.penalty

    @classmethod
    def joined(cls, parts: Sequence[Scores], order: Sequence[int]) -> Scores:
        """Those of several rollouts as one, their rows one after the other and then in this order."""
        texts = [text for part in parts for text in part.texts]
        columns = {name: [value for part in parts for value in part.parts[name]] for name in parts[0].parts}
        return cls(
            stack([part.raw for part in parts], order),
            stack([part.penalty for part in parts], order),
            {name: [column[place] for place in order] for name, column in columns.items()},
            [texts[place] for place in order],
        )


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the losses compare against; tensors are (B, T)."""

    rollout: Rollout
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor


class Judged(NamedTuple):
    """A rollout, its scores, and what the models say of it."""

    rollout: Rollout
    scores: Scores
    observed: Observed


def join(shards: Shards, block: int, rollout: Rollout, scores: Sequence[Scores], observed: Observed) -> Judged:
    """The rollouts of all processes as one, in the order in which one process would have sampled it.

    `scores` are those of every process already; `block` completions of each belong to one minibatch.
    """
    parts = shards.gather(lambda: (rollout, observed))
    order = shards.order(len(rollout), block)
    return Judged(
        Rollout.joined([part[0] for part in parts], order),
        Scores.joined(scores, order),
        Observed.joined([part[1] for part in parts], order),
    )


def first_batches(quartet: Quartet, rollout: Rollout, config: PpoConfig) -> list[Tensor]:
    """The micro-batches in which the first pass of the update reads a process's rollout.

    Scoring reads the very same ones: equal shapes give equal bits, so that the first ratio is exactly 1.
    """
    import torch

    blocks = torch.arange(len(rollout), device=rollout.mask.device).split(config.minibatch_size)
    size = config.per_device_train_batch_size
    return [batch for block in blocks for batch in micro_batches(rollout, block, size, packed=quartet.packs)]


def prove_packing(quartet: Quartet, ids: Sequence[int], say: Callable[[str], None]) -> None:
    """Compare what the policy says of a text when it is packed with what it says otherwise.

    Where that is not the same, rows are padded from here on, and it is said.
    """
    import torch

    if not quartet.packs:
        kind = quartet.model.config.model_type
        say(f"rows are padded: this {kind} model reads no packed ones, by its family, its head or its attention window")
        return
    middle = len(ids) // 2
    text = torch.tensor([list(ids), [0] * middle + list(ids)[: len(ids) - middle]], device=quartet.model.device)
    whole = torch.ones_like(text)
    whole[1, :middle] = 0
    answer = text.flip(1)[:, : middle + 1]
    rollout = Rollout(text, whole, answer, torch.ones_like(answer).float(), torch.ones(2, dtype=torch.bool))
    rows = torch.arange(2, device=text.device)
    with torch.no_grad(), active(quartet, POLICY):
        packed, padded = (
            read_policy(quartet, lay_out(rollout, rows, packed=way), 1.0).logprobs for way in (True, False)
        )
    apart = float(((packed - padded).abs() / (1 + padded.abs())).max())
    if apart > (_CLOSE if quartet.exact else _CLOSE_ROUNDED):
        quartet.packs = False
        say(f"rows are padded: a packed text differs from a padded one by {apart:.1e}")


def observe(
    quartet: Quartet, rollout: Rollout, batches: Sequence[Tensor], temperature: float, *, trusted: bool = False
) -> Observed:
    """Log-probabilities of policy and reference, entropies and values, a pass for each of the batches.

    With `trusted` sampling has said what the policy would say, so that it is not asked again unless for its values.
    """
    values = None
    if trusted and quartet.value != POLICY:
        assert rollout.logprobs is not None
        assert rollout.entropy is not None
        logprobs, entropy = rollout.logprobs, rollout.entropy
    else:
        logprobs, entropy, *rest = _per_token(
            quartet, rollout, batches, POLICY, lambda layout: read_policy(quartet, layout, temperature)
        )
        values = rest[0] if rest else None
    ref_logprobs = _per_token(
        quartet, rollout, batches, quartet.reference, lambda layout: read_policy(quartet, layout, temperature)
    )[0]
    if values is None:
        (values,) = _per_token(quartet, rollout, batches, quartet.value, lambda layout: [read_values(quartet, layout)])
    return Observed(logprobs, entropy, ref_logprobs, values)


def _per_token(
    quartet: Quartet,
    rollout: Rollout,
    batches: Sequence[Tensor],
    adapter: str | None,
    of: Callable[[Layout], Sequence[Tensor | None]],
) -> list[Tensor]:
    """Run `of` over the batches through one adapter and set its (b, t) parts together as (B, T), zero on padding."""
    import torch

    whole: list[Tensor] = []
    with torch.no_grad(), active(quartet, adapter):
        for index in batches:
            found = [part for part in of(lay_out(rollout, index, packed=quartet.packs)) if part is not None]
            whole = whole or [part.new_zeros(rollout.mask.shape) for part in found]
            for into, part in zip(whole, found, strict=True):
                into[index, : part.shape[1]] = part
    return whole


def score(
    quartet: Quartet,
    rollout: Rollout,
    records: Sequence[Record],
    rewards: RewardSum,
    batches: Sequence[Tensor],
    eos_penalty: float,
) -> Scores:
    """Score every completion once: the reward model's score, if there is one, plus the weighted rewards.

    A completion that was cut before it stopped loses `eos_penalty`.
    """
    import torch

    texts = completion_texts(quartet.loaded.tokenizer, rollout)
    values = rewards.of(records, texts)
    total = torch.tensor([rewards.total(value) for value in values], device=rollout.mask.device)
    parts = {name: [value[name] for value in values] for name in rewards.names}
    if quartet.score_head is not None:
        learned = learned_scores(quartet, rollout, batches)
        total = total + learned
        parts["reward_model"] = learned.tolist()
    return Scores(total, eos_penalty * (~rollout.stopped).to(total), parts, texts)


def learned_scores(quartet: Quartet, rollout: Rollout, batches: Sequence[Tensor]) -> Tensor:
    """The reward model's score (B,) of each completion, a pass for each of the batches."""
    import torch

    found = torch.zeros(len(rollout), device=rollout.mask.device)
    with torch.no_grad(), active(quartet, REWARD):
        for index in batches:
            found[index] = read_scores(quartet, lay_out(rollout, index, packed=quartet.packs))
    return found


def completion_texts(tokenizer: Any, rollout: Rollout) -> list[str]:
    """The completions as text, without stop token and padding; reasoning stands between <think> and </think>."""
    from align.data.reasoning import mark_thoughts

    pairs = zip(rollout.prompts, rollout.completions, strict=True)
    return [mark_thoughts(tokenizer, prompt, completion) for prompt, completion in pairs]
