"""Rewards that are programs: `@reward def name(record, completion, **args) -> float`, used in YAML by name.

Every module of this folder is imported on first use, so adding a reward is adding one file here. A program of your own
registers one by decorating it before it calls `align.training.command.run_stage`; YAML never names code. A reward
that is quicker for many completions at once takes lists: `@reward(batched=True) def name(records, completions, **args)`
and returns as many numbers.

A completion comes with the model's reasoning, between <think> and </think>, for a reward may be about its form. One
that judges the answer alone says so: `@reward(answers=True)`; it is given an empty text where reasoning never ended.

The annotation of an argument is its check, made when the settings are read: `target: Annotated[int, Field(gt=0)]`
refuses 0 and "ten" before any weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from align.config import write
from align.errors import UsageError
from align.rewards.named_functions import Named
from align.rewards.reward_arguments import read_arguments

if TYPE_CHECKING:
    from align.models.loading import Precision
    from align.registry import Checkpoint, Registry

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Reward:
    """A registered reward: its function and what is to be known about it."""

    name: str
    function: RewardFunction
    needs: tuple[str, ...] = ()
    """record fields it cannot do without"""
    batched: bool = False
    """whether it takes lists of records and completions"""
    check: Callable[..., None] | None = None
    """what refuses, with a ValueError, arguments that do not go together"""
    opens: bool = False
    """whether it takes a `Place` instead and returns an `Opened`, which judges"""
    answers: bool = False
    """whether it is given the answer alone; else a completion comes with its reasoning, between <think> and </think>"""

    def read(self, where: str, given: dict[str, Any]) -> dict[str, Any]:
        """Its keyword arguments as the types it asks for; UsageError, beginning with `where`, for unfit ones."""
        args = read_arguments(where, self.function, given, skip=1 if self.opens else 2)
        try:
            if self.check is not None:
                self.check(**args)
        except ValueError as error:
            raise UsageError(f"{where}: {error}; mend its args") from None
        return args


class Place(NamedTuple):
    """Where a reward that reads a model finds it, and how it is held."""

    registry: Registry
    precision: Precision
    say: Callable[[str], None] = write


class Opened(NamedTuple):
    """What a reward that reads a model returns: what judges, and the checkpoint that was read."""

    judge: RewardFunction
    model: Checkpoint


_REGISTERED: Named[Reward] = Named("reward", __name__)
find_reward, reward_names = _REGISTERED.find, _REGISTERED.names


@overload
def reward(function: RewardFunction) -> RewardFunction: ...
@overload
def reward(
    *,
    needs: tuple[str, ...] = (),
    batched: bool = False,
    check: Callable[..., None] | None = None,
    opens: bool = False,
    answers: bool = False,
) -> Callable[[RewardFunction], RewardFunction]: ...
def reward(
    function: RewardFunction | None = None, **facts: Any
) -> RewardFunction | Callable[[RewardFunction], RewardFunction]:
    """Register a reward under the name of its function; the fields of `Reward` say what the rest means."""

    def register(function: RewardFunction) -> RewardFunction:
        _REGISTERED.add(Reward(function.__name__, function, **facts))
        return function

    return register if function is None else register(function)
