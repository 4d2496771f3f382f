"""PPO over several processes: each samples and scores a part of a rollout, then takes a part of every minibatch.

What was sampled is shared, so every process weighs the whole rollout and steps by the same gradient, as one process
would: only the passes through the model are divided.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from align.errors import AlignError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Shards:
    """Which part of the work is this process's."""

    index: int = 0
    count: int = 1
    device: Any = "cpu"

    def rows(self, total: int, block: int) -> list[int]:
        """Which rows of a rollout this process samples: `block` of each minibatch, so that it trains on them first."""
        minibatch = block * self.count
        starts = range(self.index * block, total, minibatch)
        return [row for start in starts for row in range(start, start + block)]

    def order(self, each: int, block: int) -> list[int]:
        """Where each row of a rollout is when the `each` rows of every process stand one below the other."""
        blocks = [(start, rank) for start in range(0, each, block) for rank in range(self.count)]
        return [rank * each + start + row for start, rank in blocks for row in range(block)]

    def part(self, minibatch: Tensor) -> Tensor:
        """This process's rows of a minibatch."""
        return minibatch.chunk(self.count)[self.index]

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What every process makes, in all of them; the first of our errors among them is raised in all."""
        if self.count == 1:
            return [make()]
        import torch
        from torch import distributed

        file = io.BytesIO()
        try:
            torch.save(make(), file)
            mine: bytes | AlignError = file.getvalue()
        except AlignError as error:
            mine = error
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, mine)
        for each in found:
            if isinstance(each, AlignError):
                raise each
        # Written by this very program a moment ago, tensors of each process on the device of this one.
        return [torch.load(io.BytesIO(each), map_location=self.device, weights_only=False) for each in found]

    def largest(self, tensor: Tensor) -> None:
        """Replace a tensor by the largest of the processes."""
        if self.count > 1:
            from torch import distributed

            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes, in one exchange."""
        if self.count == 1:
            return
        import torch
        from torch import distributed

        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
