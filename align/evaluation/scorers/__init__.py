"""Scorers: functions that turn a record and a completion into named numbers, those alike in one file.

`@scorer def name(record, completion) -> dict[str, float]` registers a function by its name; tables show the mean of
each number over the records, so right or wrong is 1.0 or 0.0. `@scorer(options=...)` registers one that compares
continuations: it gets the summed log-prob and number of tokens of each option. Every module of this folder is imported
on first use. A dataset's YAML names a scorer (`scorer: gsm8k`), never code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, overload

from align.data.reasoning import strip_reasoning
from align.errors import DataError
from align.rewards import NamedFunctions
from align.schema import Record

ScoreFunction = Callable[[Record, Any], dict[str, float]]


class Likelihood(NamedTuple):
    """Summed log-prob of a continuation in nats, and its number of tokens."""

    logprob: float
    tokens: int


@dataclass(frozen=True)
class Scorer:
    """A registered scorer, called as `scorer(record, completion)`."""

    name: str
    function: ScoreFunction
    needs: tuple[str, ...] = ()
    """required fields of the record; `meta.KEY` for a column of the dataset"""
    options: Callable[[Record], list[str]] | None = None
    """continuations whose likelihoods it takes instead of a completion"""
    executes_code: bool = False
    """it executes model output, so it is called only if the user allowed that"""
    weights: Mapping[str, str] = field(default_factory=dict)
    """numbers whose mean over records is weighted, and the number each is weighted by"""

    def __call__(self, record: Record, completion: str | Sequence[Likelihood]) -> dict[str, float]:
        """Return the numbers of one completion, or of the likelihoods of `options`.

        Reasoning is removed first; unfinished reasoning leaves an empty answer.
        """
        return self.function(record, strip_reasoning(completion) if isinstance(completion, str) else completion)

    def check(self, records: Sequence[Record]) -> None:
        """Raise DataError for the first record without a required field."""
        for record, name in itertools.product(records, self.needs):
            key = name.removeprefix("meta.")
            if (getattr(record, name) if key == name else record.meta.get(key)) is None:
                raise DataError(
                    f"scorer {self.name}: needs {name}; {record.where} has none; "
                    "name its column in the dataset's YAML, or take another scorer"
                )


_REGISTERED: NamedFunctions[Scorer] = NamedFunctions("scorer", __name__)
scorer_named, scorer_names = _REGISTERED.find, _REGISTERED.names


@overload
def scorer(function: ScoreFunction) -> ScoreFunction: ...
@overload
def scorer(
    *,
    needs: tuple[str, ...] = (),
    options: Callable[[Record], list[str]] | None = None,
    executes_code: bool = False,
    weights: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[ScoreFunction], ScoreFunction]: ...
def scorer(
    function: ScoreFunction | None = None,
    *,
    needs: tuple[str, ...] = (),
    options: Callable[[Record], list[str]] | None = None,
    executes_code: bool = False,
    weights: Mapping[str, str] = MappingProxyType({}),
) -> ScoreFunction | Callable[[ScoreFunction], ScoreFunction]:
    """Register a scorer under the name of its function; the arguments are the fields of `Scorer`."""

    def register(function: ScoreFunction) -> ScoreFunction:
        _REGISTERED.add(function, Scorer(function.__name__, function, needs, options, executes_code, weights))
        return function

    return register if function is None else register(function)
