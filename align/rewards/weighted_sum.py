"""The weighted sum of the rewards that settings name: arguments checked, data checked, values checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from align.config import Settings
from align.data.reasoning import answer_of
from align.errors import DataError, shorten
from align.rewards import Place, Reward, RewardFunction, find_reward
from align.schema import Record

if TYPE_CHECKING:
    from align.registry import Checkpoint


class RewardSettings(Settings):
    """One reward of the list in YAML."""

    name: str
    """a registered reward"""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """what its value is multiplied by before all are added"""
    args: dict[str, Any] = Field(default={})
    """its keyword arguments"""


@dataclass
class _Part:
    """A reward of the sum; `label` is its name, numbered where the same one is in the sum more than once."""

    label: str
    weight: float
    reward: Reward
    args: dict[str, Any]
    judge: RewardFunction | None = None
    """what judges in place of the reward's function once it is opened"""

    def open(self, place: Place) -> Iterator[Checkpoint]:
        if self.reward.opens:
            self.judge, model = self.reward.function(place, **self.args)
            yield model

    def values(self, records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        """One number a completion; DataError, naming reward, record and completion, for anything else."""
        if self.reward.answers:
            completions = [answer_of(completion) for completion in completions]
        if not self.reward.batched:
            pairs = zip(records, completions, strict=True)
            return [self._number(self._call(*pair, pair), *pair) for pair in pairs]
        first = (records[0], completions[0])
        found = self._call(records, completions, first)
        if not _is_list(found) or len(found) != len(completions):
            raise DataError(
                f"reward {self.label}: returned {_described(found)} for {len(completions)} completions, the first "
                f"{_place(*first)}; expected one number a completion; mend the reward"
            )
        return [self._number(*row) for row in zip(found, records, completions, strict=True)]

    def _call(self, records: Any, completions: Any, asked: tuple[Record, str]) -> Any:
        if self.reward.opens:
            assert self.judge is not None, "a reward that reads a model is opened first"
            return self.judge(records, completions)
        try:
            return self.reward.function(records, completions, **self.args)
        except Exception as error:  # Whatever a program of the user's raises, the row it raised at is what helps.
            among = f"for {len(completions)} completions, the first" if self.reward.batched else "for the completion"
            raise DataError(
                f"reward {self.label}: raised {type(error).__name__} {among} {_place(*asked)}: {shorten(str(error))}; "
                "mend the reward or the row; --debug shows where"
            ) from error

    def _number(self, value: Any, record: Record, completion: str) -> float:
        number = _as_number(value)
        if number is None or not math.isfinite(number):
            raise DataError(
                f"reward {self.label}: returned {_described(value)} for the completion {_place(record, completion)}; "
                "expected one finite number; mend the reward"
            )
        return number


def _place(record: Record, completion: str) -> str:
    return f"{shorten(completion)} of {record.where}"


def _parts(settings: Sequence[RewardSettings], setting: str) -> Iterator[_Part]:
    times: Counter[str] = Counter()
    for item in settings:
        found = find_reward(item.name, setting)
        times[item.name] += 1
        # Names are Python names, so a label with a dash is never the name of another reward.
        label = item.name if times[item.name] == 1 else f"{item.name}-{times[item.name]}"
        yield _Part(label, item.weight, found, found.read(f"{setting}: {item.name}", item.args))


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

    def open(self, place: Place) -> list[Checkpoint]:
        """Load the models that rewards read, and return them; a sum with such a reward judges nothing before."""
        return [model for part in self._parts for model in part.open(place)]

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
        return self.of([record], [completion])[0]

    def of(self, records: Sequence[Record], completions: Sequence[str]) -> list[dict[str, float]]:
        """What a call returns, for every completion; rewards that take many at once are given all of them."""
        if not completions:
            return []
        columns = [part.values(records, completions) for part in self._parts]
        return [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)] or [
            {} for _ in completions
        ]

    def one(self, name: str, records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        """The values of one of `names`, unweighted, for every completion."""
        return next(part for part in self._parts if part.label == name).values(records, completions)

    def total(self, values: dict[str, float]) -> float:
        """The weighted sum of what a call returned."""
        return sum(part.weight * values[part.label] for part in self._parts)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


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
