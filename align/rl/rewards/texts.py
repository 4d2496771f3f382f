"""Rewards that look at the completion's text alone."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from align.rl.rewards import reward
from align.schema import Record


@lru_cache(maxsize=64)
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _compiles(pattern: str) -> str:
    try:
        _compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


def _none_empty(words: list[str]) -> list[str]:
    if not words or "" in words:
        raise ValueError("give words: [...], none of them empty")
    return words


Pattern = Annotated[str, AfterValidator(_compiles)]
Positive = Annotated[int, Field(gt=0)]
Words = Annotated[list[str], AfterValidator(_none_empty)]


@reward
def regex(record: Record, completion: str, pattern: Pattern, full: bool = False) -> float:
    """1 when the pattern is found in the completion, or with `full` matches all of it."""
    compiled = _compile(pattern)
    match = compiled.fullmatch(completion.strip()) if full else compiled.search(completion)
    return float(match is not None)


@reward
def length(record: Record, completion: str, target: Positive, unit: Literal["words", "characters"] = "words") -> float:
    """1 at the target length, falling in a line to 0 at none and at twice the target; unit is words or characters."""
    size = len(completion.split()) if unit == "words" else len(completion)
    return max(0.0, 1 - abs(size - target) / target)


@reward
def keyword(record: Record, completion: str, words: Words, ignore_case: bool = True) -> float:
    """The share of the words that occur in the completion."""
    text = completion.casefold() if ignore_case else completion
    return sum((word.casefold() if ignore_case else word) in text for word in words) / len(words)
