"""Rewards that are programs: `@reward def name(record, completion, **args) -> float`, used in YAML by name.

Every module of this folder is imported on first use, so adding a reward is adding one file here. A program of your own
registers one by decorating it before it calls `align.training.stage.run_stage`; YAML itself never names code.

The annotation of an argument is its check, made when the settings are read: `target: Annotated[int, Field(gt=0)]`
refuses 0 and "ten" before any weights are loaded.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

from pydantic import Field

from align.config import Settings
from align.errors import DataError, UsageError, nearest, shorten
from align.rl.arguments import read_arguments
from align.schema import Record

RewardFunction = Callable[..., float]


class RewardSettings(Settings):
    """One reward of the list in YAML."""

    name: str
    """a registered reward"""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """what its value is multiplied by before all are added"""
    args: dict[str, Any] = Field(default={})
    """its keyword arguments"""


@dataclass(frozen=True)
class Reward:
    """A registered reward: its function and the record fields it cannot do without."""

    name: str
    function: RewardFunction
    needs: tuple[str, ...] = ()


_REGISTERED: dict[str, Reward] = {}


@overload
def reward(function: RewardFunction) -> RewardFunction: ...
@overload
def reward(*, needs: tuple[str, ...]) -> Callable[[RewardFunction], RewardFunction]: ...
def reward(
    function: RewardFunction | None = None, *, needs: tuple[str, ...] = ()
) -> RewardFunction | Callable[[RewardFunction], RewardFunction]:
    """Register a reward under the name of its function; `needs` lists record fields that every row must have."""

    def register(function: RewardFunction) -> RewardFunction:
        name = function.__name__
        known = _REGISTERED.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise UsageError(f"reward {name}: already registered by {known.function.__module__}; choose another name")
        _REGISTERED[name] = Reward(name, function, needs)
        return function

    return register if function is None else register(function)


@cache
def _import_built_in() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def reward_names() -> list[str]:
    """The names of all registered rewards."""
    _import_built_in()
    return sorted(_REGISTERED)


def find_reward(name: str, setting: str = "rewards") -> Reward:
    """The registered reward of a name, or a UsageError that begins with the setting that asked for it."""
    _import_built_in()
    if name not in _REGISTERED:
        raise UsageError(
            f"{setting}: asked for {shorten(name)}; no reward has that name;{nearest(name, reward_names())}"
        )
    return _REGISTERED[name]


@dataclass(frozen=True)
class _Part:
    """A reward of the sum; `label` is its name, numbered where the same one is in the sum more than once."""

    label: str
    weight: float
    reward: Reward
    args: dict[str, Any]


def _parts(settings: Sequence[RewardSettings], setting: str) -> Iterator[_Part]:
    times: Counter[str] = Counter()
    for item in settings:
        found = find_reward(item.name, setting)
        times[item.name] += 1
        # Names are Python names, so a label with a dash is never the name of another reward.
        label = item.name if times[item.name] == 1 else f"{item.name}-{times[item.name]}"
        yield _Part(label, item.weight, found, read_arguments(f"{setting}: {item.name}", found.function, item.args))


class RewardSum:
    """The weighted sum of some rewards, checked against the data before anything is sampled.

    Raises UsageError for an unknown name or a wrong argument, beginning with the name of the `setting`.
    """

    def __init__(self, settings: Sequence[RewardSettings], setting: str = "rewards"):
        self._parts = list(_parts(settings, setting))

    @property
    def names(self) -> list[str]:
        """The rewards' names, in order; the second of a name is called `name-2`, and so on."""
        return [part.label for part in self._parts]

    def check(self, records: Sequence[Record]) -> None:
        """Raise DataError for the first record that lacks a field some reward needs."""
        for part in (part.reward for part in self._parts):
            for record in records:
                missing = next((field for field in part.needs if getattr(record, field) is None), None)
                if missing:
                    raise DataError(
                        f"reward {part.name}: needs the field {missing}; {record.where} has none; "
                        "add it to the data or take another reward"
                    )

    def __call__(self, record: Record, completion: str) -> dict[str, float]:
        """Each reward's value, unweighted, by name."""
        return {part.label: self._value(part, record, completion) for part in self._parts}

    def total(self, values: dict[str, float]) -> float:
        """The weighted sum of what a call returned."""
        return sum(part.weight * values[part.label] for part in self._parts)

    def _value(self, part: _Part, record: Record, completion: str) -> float:
        asked = f"for the completion {shorten(completion)} of {record.where}"
        try:
            value = part.reward.function(record, completion, **part.args)
        except Exception as error:  # Whatever a program of the user's raises, the row it raised at is what helps.
            raise DataError(
                f"reward {part.label}: raised {type(error).__name__} {asked}: {shorten(str(error))}; "
                "mend the reward or the row; --debug shows where"
            ) from error
        number = _as_number(value)
        if number is None or not math.isfinite(number):
            raise DataError(
                f"reward {part.label}: returned {_described(value)} {asked}; expected one finite number; "
                "mend the reward"
            )
        return number


def _as_number(value: Any) -> float | None:
    """What a reward returned as a number, also from an array of one; None when it is anything else."""
    try:
        single = value.item() if getattr(value, "ndim", 0) else value
        # Text has no __float__, though float() reads it: a reward that returns text is a mistake.
        return float(single) if hasattr(single, "__float__") or hasattr(single, "__index__") else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _described(value: Any) -> str:
    if getattr(value, "ndim", 0) or isinstance(value, list | tuple):
        return f"{len(value)} values, {shorten(value)},"
    return shorten(value)
