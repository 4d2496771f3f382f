"""Scorers: programs that turn a record and a completion into named numbers, each file one published rule.

`@scorer def name(record, completion) -> dict[str, float]` registers one by its name; the mean of each number over the
records is what a table shows, so a number that is right or wrong is 1.0 or 0.0. A scorer that compares continuations
instead of reading a completion says which ones: `@scorer(options=...)` is then called with the sum of log-probs and
the number of tokens of each option. Every module of this folder is imported on first use. YAML names a scorer, never
code: `scorer: gsm8k` in a dataset's YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, overload

from align.data.reasoning import strip_reasoning
from align.errors import DataError
from align.rewards.named_functions import NamedFunctions
from align.schema import Record

ScoreFunction = Callable[[Record, Any], dict[str, float]]


class Likelihood(NamedTuple):
    """How likely a model finds a continuation of a prompt: the sum of its tokens' log-probs in nats, and how many."""

    logprob: float
    tokens: int


@dataclass(frozen=True)
class Scorer:
    """A registered scorer, called as `scorer(record, completion)`."""

    name: str
    function: ScoreFunction
    needs: tuple[str, ...] = ()
    """fields of the record it cannot do without; `meta.KEY` for one of the data set's own columns"""
    options: Callable[[Record], list[str]] | None = None
    """the continuations of the record's prompt it compares; such a scorer takes likelihoods, and nothing is sampled"""
    executes_code: bool = False
    """whether it runs what the model wrote; it is called only where the user allowed that"""
    weights: Mapping[str, str] = field(default_factory=dict)
    """numbers that are shares, and the number each is a share of: over records the mean is weighted by that"""

    def __call__(self, record: Record, completion: str | Sequence[Likelihood]) -> dict[str, float]:
        """The numbers of one completion; of the likelihoods of `options`, where it has them.

        Reasoning is no part of an answer and is taken off first; a thought that never ended leaves an empty answer.
        """
        return self.function(record, strip_reasoning(completion) if isinstance(completion, str) else completion)

    def check(self, records: Sequence[Record]) -> None:
        """Raise DataError for the first record that lacks something the scorer needs."""
        for record in records:
            missing = next((field for field in self.needs if _lacks(record, field)), None)
            if missing:
                raise DataError(
                    f"scorer {self.name}: needs {missing}; {record.where} has none; "
                    "name its column in the dataset's YAML, or take another scorer"
                )


def _lacks(record: Record, field: str) -> bool:
    owner, _, key = field.partition(".")
    return record.meta.get(key) is None if owner == "meta" else getattr(record, field) is None


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
    """Register a scorer under the name of its function; the parts are those of `Scorer`."""

    def register(function: ScoreFunction) -> ScoreFunction:
        _REGISTERED.add(function, Scorer(function.__name__, function, needs, options, executes_code, weights))
        return function

    return register if function is None else register(function)
