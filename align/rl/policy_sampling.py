"""Sampling from a policy with a KV cache: a prompt is read once for all its completions, finished rows are evicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from align.rl.rollout import Rollout, completion_mask

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


class SampledToken(NamedTuple):
    """One token of each row (B,): its id, its log-probability, and the entropy of its distribution."""

    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor


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
    return Rollout.joined(parts, sorted(range(len(order)), key=order.__getitem__))


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> SampledToken:
    """Sample a token of each row by inverting its distribution; logits (B, V), uniform (B,) in [0, 1).

    The token is the first at which the cumulated probability exceeds the uniform number's share of the total, with the
    tokens in the order of their probability where only the likeliest are kept (Holtzman et al. 2020).
    """
    import torch

    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    # A vocabulary of 100,000 cumulated in single precision is wrong in the fifth digit.
    ordered = logprobs.double().exp_()
    entropy = torch.special.entr(ordered).sum(dim=-1).float()
    ids = None
    if top_p < 1:
        ordered, ids = ordered.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p, so the first always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    mass = ordered.cumsum(dim=-1)
    threshold = uniform.to(mass)[:, None] * mass[:, -1:]
    index = torch.searchsorted(mass, threshold, right=True).clamp(max=mass.shape[1] - 1)
    tokens = index if ids is None else ids.gather(1, index)
    return SampledToken(tokens[:, 0], logprobs.gather(1, tokens)[:, 0], entropy)


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
    batch = _DecodingBatch(policy.causal, prompt_ids, prompt_mask)
    if len(unique) < len(prompts):
        batch.select(owners)
    rows = torch.arange(len(prompts), device=device)
    for column in range(sampling.max_new_tokens):
        sampled = sample_tokens(batch.logits, noise[rows, column], sampling.temperature, sampling.top_p)
        ids[rows, column], logprobs[rows, column], entropy[rows, column] = sampled
        unfinished = (~torch.isin(sampled.tokens, stop_ids)).nonzero()[:, 0]
        if not len(unfinished) or column + 1 == sampling.max_new_tokens:
            break
        if len(unfinished) < len(rows):
            batch.select(unfinished)
            rows = rows[unfinished]
        batch.extend(sampled.tokens[unfinished])
    width = column + 1
    mask, stopped = completion_mask(ids[:, :width], stops)
    # Where pad and stop are one token, what was never sampled looks like a second stop; the mask ends before it.
    return Rollout(
        prompt_ids[owners], prompt_mask[owners], ids[:, :width].masked_fill(mask == 0, pad), mask, stopped,
        logprobs[:, :width], entropy[:, :width],
    )  # fmt: skip


class _DecodingBatch:
    """Unfinished rows: their keys and values, and the logits (B, V) of the next token."""

    def __init__(self, causal: Any, ids: Tensor, mask: Tensor) -> None:
        from transformers import DynamicCache

        self._causal, self._mask = causal, mask
        self._cache = DynamicCache(config=causal.config)
        self.logits = self._forward(ids, (mask.cumsum(dim=1) - 1).clamp(min=0))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, of which one may occur several times."""
        self._cache.batch_select_indices(rows)
        self._mask, self.logits = self._mask[rows], self.logits[rows]

    def extend(self, tokens: Tensor) -> None:
        """Append one token to each row."""
        import torch

        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self.logits = self._forward(tokens[:, None], self._mask.sum(dim=1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._causal(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return prompts as (ids, attention mask), both (B, longest), with the padding before the text."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def _uniform(seed: tuple[int, ...], count: int) -> Tensor:
    """Return the `count` numbers in [0, 1) that sample one row's tokens."""
    import numpy
    import torch

    return torch.from_numpy(numpy.random.default_rng(seed).random(count))
