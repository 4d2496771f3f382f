"""The processes of one run: `torchrun` starts several, each trains on its part of a batch, the first writes and speaks.

Every process walks the same way through a run, so they meet at the same calls here. Data parallel training of one model
on every device (DDP) is what this knows; sharded models are refused.
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
_JOIN = timedelta(minutes=5)
"""how long a process waits for the others to come"""
_COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""how long ranks wait for one that is at work alone: rank 0 tokenises, scores and saves for all; a rank that died is
noticed at once
"""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.index == 0

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; what it raises ends all of them.

        The others wait for it, so they also see every file that it wrote.
        """
        if self.count == 1:
            return make()
        from torch import distributed

        made: list[Any] = [None, None]
        if self.first:
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

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of them."""
        if self.count == 1:
            return flag
        import torch
        from torch import distributed

        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return bool(flags)

    def wait(self) -> None:
        """Go on when all have come here."""
        self.any(False)


def join_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Find the other processes that `torchrun` started; without `WORLD_SIZE` there are none.

    Raises UsageError when the number asked for is not the number that came.
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
    found = _connect(int(asked), int(environment["RANK"]))
    if found.count != int(asked):
        raise UsageError(f"WORLD_SIZE={asked}: {found.count} processes came; start them all with torchrun")
    return found


def _connect(count: int, index: int) -> Ranks:
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        try:
            # Joined apart from the process group, whose own patience must outlast the longest save of the first.
            store, index, count = next(distributed.rendezvous("env://", index, count, timeout=_JOIN))
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"WORLD_SIZE={count}: the processes did not find each other ({str(error).splitlines()[0]}); "
                "start them all with torchrun, which tells them where they meet"
            ) from None
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=index,
            world_size=count,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    return Ranks(distributed.get_rank(), distributed.get_world_size())
