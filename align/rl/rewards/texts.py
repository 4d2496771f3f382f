"""Rewards that look at the completion's text alone."""

from __future__ import annotations

import re
from functools import lru_cache

from align.errors import UsageError, shorten
from align.rl.rewards import reward
from align.schema import Record


@lru_cache(maxsize=64)
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"reward regex: asked for {shorten(pattern)}; {error}; mend the pattern") from None


@reward
def regex(record: Record, completion: str, pattern: str, full: bool = False) -> float:
    """1 when the pattern is found in the completion, or with `full` matches all of it."""
    compiled = _compile(pattern)
    match = compiled.fullmatch(completion.strip()) if full else compiled.search(completion)
    return float(match is not None)


@reward
def length(record: Record, completion: str, target: int, unit: str = "words") -> float:
    """1 at the target length, falling in a line to 0 at none and at twice the target; unit is words or characters."""
    if unit not in ("words", "characters") or target <= 0:
        raise UsageError(f"reward length: target {target}, unit {unit!r}; give a target above 0 in words or characters")
    size = len(completion.split()) if unit == "words" else len(completion)
    return max(0.0, 1 - abs(size - target) / target)


@reward
def keyword(record: Record, completion: str, words: list[str], ignore_case: bool = True) -> float:
    """The share of the words that occur in the completion."""
    if not words:
        raise UsageError("reward keyword: no words; give words: [...]")
    text = completion.casefold() if ignore_case else completion
    return sum((word.casefold() if ignore_case else word) in text for word in words) / len(words)
