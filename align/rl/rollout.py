"""Rollouts: which prompts come next, and the completions sampled for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from align.rl.ppo_settings import SamplingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from align.rl.ppo_models import Quartet

__all__ = ["PromptStream", "Rollout", "SamplingSettings", "completion_mask", "iterations", "sample", "stack"]


class PromptStream:
    """An endless stream of prompt indices, reshuffled every epoch; `cursor` alone says where it stands."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.cursor = count, seed, 0

    def take(self, size: int) -> list[int]:
        """The next `size` indices."""
        taken: list[int] = []
        while len(taken) < size:
            epoch, start = divmod(self.cursor, self.count)
            part = self._order(epoch)[start : start + size - len(taken)]
            self.cursor += len(part)
            taken += part
        return taken

    def _order(self, epoch: int) -> list[int]:
        import numpy

        return numpy.random.default_rng((self.seed, epoch)).permutation(self.count).tolist()


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

    @classmethod
    def joined(cls, parts: Sequence[Rollout], order: Sequence[int]) -> Rollout:
        """Several rollouts as one, their rows one after the other and then in this order."""

        def join(of: Callable[[Rollout], Any], *, left: bool = False) -> Any:
            found = [of(part) for part in parts]
            return stack(found, order, left=left) if found[0] is not None else None

        return cls(
            prompt_ids=join(lambda part: part.prompt_ids, left=True),
            prompt_mask=join(lambda part: part.prompt_mask, left=True),
            completion_ids=join(lambda part: part.completion_ids),
            mask=join(lambda part: part.mask),
            stopped=join(lambda part: part.stopped),
            logprobs=join(lambda part: part.logprobs),
            entropy=join(lambda part: part.entropy),
        )


def stack(parts: Sequence[Tensor], order: Sequence[int], *, left: bool = False) -> Tensor:
    """Tensors (b, ...) one below the other and then in this order; those of two dimensions padded to one width."""
    import torch
    from torch.nn.functional import pad

    if parts[0].dim() == 1:
        return torch.cat(list(parts))[list(order)]
    width = max(part.shape[1] for part in parts)
    widened = [pad(part, (width - part.shape[1], 0) if left else (0, width - part.shape[1])) for part in parts]
    return torch.cat(widened)[list(order)]


def sample(
    quartet: Quartet,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    stops: Sequence[int],
    seeds: Sequence[tuple[int, ...]],
    at_once: int | None = None,
) -> Rollout:
    """Sample one completion for each prompt from the policy, `at_once` of them at a time.

    A row draws from its own seed, so what it says depends on nothing that is sampled beside it. A prompt that is there
    several times is read once. Nothing of the model's own generation defaults is used: the policy that samples must be
    the policy that is trained.
    """
    import torch

    from align.rl.decoding import decode
    from align.rl.ppo_models import POLICY, active, arithmetic

    noise = torch.stack([_uniform(seed, sampling.max_new_tokens) for seed in seeds])
    # Prompts of like length share a batch; equal ones stay beside each other.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    size = at_once or len(prompts)
    parts = []
    with torch.no_grad(), active(quartet, POLICY), arithmetic(quartet):
        for begin in range(0, len(order), size):
            rows = order[begin : begin + size]
            parts.append(decode(quartet, [prompts[row] for row in rows], sampling, noise[rows], stops))
    places = sorted(range(len(order)), key=order.__getitem__)
    return Rollout.joined(parts, places)


def _uniform(seed: tuple[int, ...], count: int) -> Tensor:
    """The numbers in [0, 1) that one row draws its tokens with."""
    import numpy
    import torch

    return torch.from_numpy(numpy.random.default_rng(seed).random(count))


def completion_mask(completion_ids: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask (B, T) up to and with the first stop token, and which rows (B,) have one."""
    import torch

    is_stop = torch.isin(completion_ids, torch.tensor(list(stops), device=completion_ids.device))
    before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return (before == 0).float(), is_stop.any(dim=1)


def iterations(rows: int, batch: int, epochs: float, max_steps: int) -> int:
    """How many rollouts a run makes: `max_steps` when given, else enough to see the prompts `epochs` times."""
    return max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / batch))
