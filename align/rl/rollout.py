"""Rollouts: the order in which prompts come, sampling with a KV cache, and sampled completions as tensors.

A prompt is read once for all its completions; finished rows are evicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar, cast

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad

from align.models.decoding import CachedRows, Decoder, pad_left, sample_from_uniform
from align.models.loading import Precision
from align.rl.ppo_settings import SamplingSettings


class PromptStream:
    """An endless stream of prompt indices, reshuffled every epoch; `cursor` is its whole state."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.cursor = count, seed, 0

    def take(self, size: int) -> list[int]:
        """Return the next `size` indices."""
        taken: list[int] = []
        while len(taken) < size:
            epoch, start = divmod(self.cursor, self.count)
            order = numpy.random.default_rng((self.seed, epoch)).permutation(self.count)
            part = order[start : start + size - len(taken)].tolist()
            self.cursor += len(part)
            taken += part
        return taken


@dataclass(frozen=True)
class Rollout:
    """Sampled completions: prompts padded on the left (B, P), completions on the right (B, T)."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    """(B, T) float, 1 on the tokens of the completion, its stop token included"""
    stopped: Tensor
    """(B,) bool: whether a stop token was sampled"""
    logprobs: Tensor | None = None
    """(B, T) of the tokens under the tempered policy, as they were sampled"""
    entropy: Tensor | None = None
    """(B, T) of the distributions they were sampled from, before top_p"""

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion (B,)."""
        return self.mask.sum(dim=1).long()

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The prompts without padding."""
        sizes = self.prompt_mask.sum(dim=1).tolist()
        return [ids[len(ids) - size :] for ids, size in zip(self.prompt_ids.tolist(), sizes, strict=True)]

    @cached_property
    def completions(self) -> list[list[int]]:
        """The completions without padding, each with its stop token if it has one."""
        return [ids[:size] for ids, size in zip(self.completion_ids.tolist(), self.lengths.tolist(), strict=True)]


RowsT = TypeVar("RowsT")


def join_rows(parts: Sequence[RowsT], order: Sequence[int], *, left: bool = False) -> RowsT:
    """Return the rows of several tensors, lists, or dicts or dataclasses of these, joined and then in this order.

    Tensors of two dimensions are padded to one width: on the left with `left`, as the prompts of a rollout are.
    """
    first: Any = parts[0]
    kind: Any = type(first)
    if isinstance(first, torch.Tensor):
        tensors: list[Tensor] = list(cast("Any", parts))
        if first.dim() > 1:
            width = max(tensor.shape[1] for tensor in tensors)
            missing = [width - tensor.shape[1] for tensor in tensors]
            tensors = [pad(one, (size, 0) if left else (0, size)) for one, size in zip(tensors, missing, strict=True)]
        joined: Any = torch.cat(tensors)[list(order)]
    elif isinstance(first, list):
        rows = list(chain.from_iterable(cast("Any", parts)))
        joined = [rows[index] for index in order]
    elif isinstance(first, dict):
        joined = {key: join_rows([cast("Any", part)[key] for part in parts], order) for key in first}
    elif is_dataclass(first):
        columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(first)}
        joined = kind(**{name: join_rows(columns[name], order, left="prompt" in name) for name in columns})
    else:
        joined = first
    return cast("RowsT", joined)


def completion_mask(completion_ids: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mask (B, T) up to and with the first stop token, and which rows (B,) have one."""
    is_stop = torch.isin(completion_ids, torch.tensor(list(stops), device=completion_ids.device))
    before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return (before == 0).float(), is_stop.any(dim=1)


def count_rollouts(rows: int, batch: int, epochs: float, max_steps: int) -> int:
    """Return the number of rollouts of a run: `max_steps` when given, else enough to see the prompts `epochs` times."""
    return max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / batch))


@dataclass(frozen=True)
class SamplingPolicy:
    """The model that completions are sampled from, and how it computes; every stage that samples makes one."""

    model: Any
    """a PEFT model, or a causal language model without adapters"""
    adapter: str | None
    """the PEFT model's adapter that samples; None for a model without adapters"""
    tokenizer: Any
    precision: Precision

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
    # One uniform number in [0, 1) for each token of a row.
    draws = (numpy.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds)
    noise = torch.stack([torch.from_numpy(numbers) for numbers in draws])
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
    device, pad = policy.model.device, policy.tokenizer.pad_token_id
    stop_ids, noise = torch.tensor(list(stops), device=device), noise.to(device)
    unique = list(dict.fromkeys(map(tuple, prompts)))
    prompt_ids, prompt_mask = pad_left(unique, pad, device)
    index = {prompt: row for row, prompt in enumerate(unique)}
    owners = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
    shape = len(prompts), sampling.max_new_tokens
    ids = torch.full(shape, pad, device=device)
    logprobs, entropy = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    causal = policy.model if policy.adapter is None else policy.model.get_base_model()
    decoder, cached = Decoder(causal), CachedRows(prompt_mask)
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
