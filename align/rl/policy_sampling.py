"""Sampling from a policy with a KV cache: a prompt is read once for all its completions, finished rows are evicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.models.decoding import CachedRows, Decoder, pad_left, sample_from_uniform
from align.rl.rollout import Rollout, completion_mask, join_rows

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.loading import Precision
    from align.rl.ppo_settings import SamplingSettings


@dataclass(frozen=True)
class SamplingPolicy:
    """The model that completions are sampled from, and how it computes; every stage that samples makes one."""

    model: Any
    """a PEFT model, or a causal language model without adapters"""
    adapter: str | None
    """the PEFT model's adapter that samples; None for a model without adapters"""
    tokenizer: Any
    precision: Precision

    @property
    def causal(self) -> Any:
        """The causal language model itself, with the adapters inside."""
        return self.model if self.adapter is None else self.model.get_base_model()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run forward passes through the adapter, in the precision the settings ask for."""
        before = self.model.active_adapter if self.adapter is not None else None
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)
        try:
            with self.autocast():
                yield
        finally:
            if before is not None:
                self.model.set_adapter(before)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in bfloat16 where the settings ask for it, adapters included, as TRL's trainers do."""
        import torch

        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision.uses_bf16)


def sample_completions(
    policy: SamplingPolicy,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    stops: Sequence[int],
    seeds: Sequence[tuple[int, ...]],
    batch_size: int | None = None,
) -> Rollout:
    """Sample one completion for each prompt, `batch_size` of them at a time.

    Each row has its own seed, so its tokens do not depend on the rows beside it. A prompt that occurs several times is
    read once. None of the model's own generation defaults are used: the policy that samples must be the policy that is
    trained.
    """
    import torch

    noise = torch.stack([_uniform(seed, sampling.max_new_tokens) for seed in seeds])
    # Prompts of like length share a batch; equal ones stay beside each other.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    size = batch_size or len(prompts)
    parts = []
    with torch.no_grad(), policy.active():
        for begin in range(0, len(order), size):
            rows = order[begin : begin + size]
            parts.append(_decode(policy, [prompts[row] for row in rows], sampling, noise[rows], stops))
    return join_rows(parts, sorted(range(len(order)), key=order.__getitem__))


def _decode(
    policy: SamplingPolicy,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    noise: Tensor,
    stops: Sequence[int],
) -> Rollout:
    """Sample one completion for each prompt; noise (B, max_new_tokens) uniform in [0, 1)."""
    import torch

    device, pad = policy.model.device, policy.tokenizer.pad_token_id
    stop_ids, noise = torch.tensor(list(stops), device=device), noise.to(device)
    unique = list(dict.fromkeys(map(tuple, prompts)))
    prompt_ids, prompt_mask = pad_left(unique, pad, device)
    index = {prompt: row for row, prompt in enumerate(unique)}
    owners = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
    shape = len(prompts), sampling.max_new_tokens
    ids = torch.full(shape, pad, device=device)
    logprobs, entropy = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    decoder, cached = Decoder(policy.causal), CachedRows(prompt_mask)
    logits = decoder.prefill(cached, prompt_ids, 0, cached.columns)[:, -1]
    if len(unique) < len(prompts):
        cached.select(owners)
        logits = logits[owners]
    rows = torch.arange(len(prompts), device=device)
    for column in range(sampling.max_new_tokens):
        sampled = sample_from_uniform(logits, noise[rows, column], sampling.temperature, sampling.top_p)
        ids[rows, column], logprobs[rows, column], entropy[rows, column] = sampled
        unfinished = (~torch.isin(sampled.tokens, stop_ids)).nonzero()[:, 0]
        if not len(unfinished) or column + 1 == sampling.max_new_tokens:
            break
        if len(unfinished) < len(rows):
            cached.select(unfinished)
            rows = rows[unfinished]
        logits = decoder.step(cached, sampled.tokens[unfinished])
    width = column + 1
    mask, stopped = completion_mask(ids[:, :width], stops)
    # Where pad and stop are one token, what was never sampled looks like a second stop; the mask ends before it.
    return Rollout(
        prompt_ids[owners], prompt_mask[owners], ids[:, :width].masked_fill(mask == 0, pad), mask, stopped,
        logprobs[:, :width], entropy[:, :width],
    )  # fmt: skip


def _uniform(seed: tuple[int, ...], count: int) -> Tensor:
    """Return `count` uniform numbers in [0, 1): one for each token of a row."""
    import numpy
    import torch

    return torch.from_numpy(numpy.random.default_rng(seed).random(count))
