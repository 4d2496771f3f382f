"""The ranks of a run: `torchrun` starts them, each trains on its part of a batch, and rank 0 writes and prints.

All ranks make the same calls to this module in the same order. It knows data parallel training (DDP); sharded training
is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from align.errors import AlignError, MachineError, UsageError, shorten

T = TypeVar("T")

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
_JOIN_TIMEOUT = timedelta(minutes=5)
"""how long a process waits for the others to join"""
_COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""how long ranks wait while rank 0 tokenises, scores or saves for all; a rank that died is noticed at once"""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes of its run."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """Return on all ranks what `make` returns on rank 0; an error that it raises ends all of them.

        The others wait for it, so they also see every file that it wrote.
        """
        if self.world_size == 1:
            return make()
        from torch import distributed

        made: list[Any] = [None, None]
        if self.is_rank_zero:
            try:
                made[0] = make()
            except AlignError as error:
                made[1] = error
            except BaseException as error:
                failed = f"rank 0 failed: {type(error).__name__}: {shorten(str(error))}; see what it printed"
                distributed.broadcast_object_list([None, MachineError(failed)])
                raise
        distributed.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        result: T = made[0]
        return result

    def rank_zero_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on each rank; the others call it after rank 0, and find the files it wrote."""
        made: list[T] = []
        self.from_rank_zero(lambda: made.append(make()))
        return made[0] if made else make()

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on one of the ranks."""
        if self.world_size == 1:
            return flag
        import torch
        from torch import distributed

        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return bool(flags)

    def wait_for_everyone(self) -> None:
        """Return when all ranks have called this."""
        self.any(False)


def join_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Join the other processes that `torchrun` started; without `WORLD_SIZE` there are none.

    Raises UsageError when another number of processes joins than was asked for.
    """
    asked = environment.get("WORLD_SIZE", "1")
    sharded = [name for name in _SHARDED if environment.get(name, "false").lower() == "true"]
    if sharded:
        raise UsageError(f"{sharded[0]}: sharded training is not supported; unset it, and start with torchrun (DDP)")
    if asked == "1":
        return Ranks()
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing or not asked.isdigit():
        raise UsageError(
            f"WORLD_SIZE={asked}: this is one process on its own ({', '.join(missing)} not set); start all of them "
            f"with torchrun --nproc_per_node {asked} -m align.STAGE ..., or unset WORLD_SIZE"
        )
    ranks = _connect(int(asked), int(environment["RANK"]))
    if ranks.world_size != int(asked):
        raise UsageError(f"WORLD_SIZE={asked}: {ranks.world_size} processes joined; start them all with torchrun")
    return ranks


def _connect(count: int, index: int) -> Ranks:
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        try:
            # Joined apart from the process group, whose own timeout must outlast the longest save of rank 0.
            store, index, count = next(distributed.rendezvous("env://", index, count, timeout=_JOIN_TIMEOUT))
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"WORLD_SIZE={count}: the processes did not find each other ({str(error).splitlines()[0]}); "
                "start them all with torchrun, which gives them the address"
            ) from None
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=index,
            world_size=count,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    return Ranks(distributed.get_rank(), distributed.get_world_size())
