"""Rollouts: the order in which prompts come, and sampled completions as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class PromptStream:
    """An endless stream of prompt indices, reshuffled every epoch; `cursor` alone says where it stands."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.cursor = count, seed, 0

    def take(self, size: int) -> list[int]:
        """Return the next `size` indices."""
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
        """Return the rows of several rollouts, concatenated and then in this order, as one."""

        def join(column: Callable[[Rollout], Any], *, left: bool = False) -> Any:
            columns = [column(part) for part in parts]
            return concatenate(columns, order, left=left) if columns[0] is not None else None

        return cls(
            prompt_ids=join(lambda part: part.prompt_ids, left=True),
            prompt_mask=join(lambda part: part.prompt_mask, left=True),
            completion_ids=join(lambda part: part.completion_ids),
            mask=join(lambda part: part.mask),
            stopped=join(lambda part: part.stopped),
            logprobs=join(lambda part: part.logprobs),
            entropy=join(lambda part: part.entropy),
        )


def concatenate(parts: Sequence[Tensor], order: Sequence[int], *, left: bool = False) -> Tensor:
    """Return the rows of tensors (b, ...) in this order; those of two dimensions are padded to one width."""
    import torch
    from torch.nn.functional import pad

    if parts[0].dim() == 1:
        return torch.cat(list(parts))[list(order)]
    width = max(part.shape[1] for part in parts)
    widened = [pad(part, (width - part.shape[1], 0) if left else (0, width - part.shape[1])) for part in parts]
    return torch.cat(widened)[list(order)]


def completion_mask(completion_ids: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mask (B, T) up to and with the first stop token, and which rows (B,) have one."""
    import torch

    is_stop = torch.isin(completion_ids, torch.tensor(list(stops), device=completion_ids.device))
    before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return (before == 0).float(), is_stop.any(dim=1)


def count_rollouts(rows: int, batch: int, epochs: float, max_steps: int) -> int:
    """Return the number of rollouts of a run: `max_steps` when given, else enough to see the prompts `epochs` times."""
    return max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / batch))
