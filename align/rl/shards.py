"""PPO over several ranks: each samples and scores a part of a rollout, then trains on a part of every minibatch.

Rollouts are gathered, so every rank computes the advantages of the whole rollout and steps by the same gradient, as one
process would: only the forward and backward passes are divided.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from align.errors import AlignError

T = TypeVar("T")


@dataclass(frozen=True)
class Shards:
    """This rank's part of the work."""

    index: int = 0
    count: int = 1
    device: Any = "cpu"

    def rows(self, total: int, block: int) -> list[int]:
        """Return the rows of a rollout that this rank samples: `block` of each minibatch, which it trains on first."""
        minibatch = block * self.count
        starts = range(self.index * block, total, minibatch)
        return [row for start in starts for row in range(start, start + block)]

    def order(self, rows_per_rank: int, block: int) -> list[int]:
        """Return the index of each row of a rollout in the concatenated rows of all ranks."""
        blocks = [(start, rank) for start in range(0, rows_per_rank, block) for rank in range(self.count)]
        return [rank * rows_per_rank + start + row for start, rank in blocks for row in range(block)]

    def part(self, minibatch: Tensor) -> Tensor:
        """Return this rank's rows of a minibatch."""
        return minibatch.chunk(self.count)[self.index]

    def gather(self, make: Callable[[], T]) -> list[T]:
        """Return what every rank makes, on every rank; the first AlignError among them is raised on all."""
        if self.count == 1:
            return [make()]
        file = io.BytesIO()
        try:
            torch.save(make(), file)
            mine: bytes | AlignError = file.getvalue()
        except AlignError as error:
            mine = error
        gathered: list[Any] = [None] * self.count
        distributed.all_gather_object(gathered, mine)
        for part in gathered:
            if isinstance(part, AlignError):
                raise part
        # Written by this very program a moment ago; tensors of the other ranks go to this rank's device.
        return [torch.load(io.BytesIO(part), map_location=self.device, weights_only=False) for part in gathered]

    def all_reduce_max(self, tensor: Tensor) -> None:
        """Replace a tensor by its maximum over the ranks."""
        if self.count > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, in one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
