"""Rewards of the completion's text alone, and rewards that compare it with what the record asks for."""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from align.rewards import reward
from align.schema import Record
from align.world.desk_judge import ExpectedAnswer, judge_answer
from align.world.judge import judge

# A sign belongs to the number unless something stands before it ("7-3" ends in 3, not in -3). Letters glued to its
# front make it no number ("mp3"); ASCII letters only, for Chinese is written without spaces. Commas group by three. The
# exponent has two digits at most: a sampled completion may hold 1e999999999, which would fill the memory.
_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z_)\]])(?P<sign>[-−+]))?(?:[$€£¥]\s?(?P<sign_inside>[-−])?)?(?<![0-9A-Za-z_])"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:\.\d+)?|\.\d+)(?P<decimals>(?<=,\d{3})\.\d+)?"
    r"(?P<exponent>[eE][-+]?\d{1,2}(?!\d))?(?:/(?P<below>[1-9]\d{0,8})(?![\d/.]))?",
    re.ASCII,
)


def last_number(text: str) -> Fraction | None:
    """Return the last number in a text, exactly; None when there is none.

    Reads `1,234.50`, `-3`, `$5`, `12%` (as 12), `3/4` and `2.5e3`.
    """
    numbers = list(_NUMBER.finditer(text.replace("\\", "").replace("{,}", ",")))
    if not numbers:
        return None
    match = numbers[-1]
    digits = match["digits"].replace(",", "")
    value = Fraction(Decimal(digits + (match["decimals"] or "") + (match["exponent"] or "")))
    value /= int(match["below"] or 1)
    negative = match["sign"] in ("-", "−") or match["sign_inside"] is not None
    return -value if negative else value


Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _normalise(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text


@reward(needs=("answer",), answer_only=True)
def exact_match(record: Record, completion: str, ignore_case: bool = False) -> float:
    """1 when the completion is the record's answer, apart from white space."""
    return float(_normalise(completion, ignore_case) == _normalise(record.answer or "", ignore_case))


@reward(needs=("answer",), answer_only=True)
def numeric_match(record: Record, completion: str, tolerance: Tolerance = 0.0) -> float:
    """1 when the last number in the completion equals the last number in the record's answer."""
    wanted, given = last_number(record.answer or ""), last_number(completion)
    if wanted is None or given is None:
        return 0.0
    return float(abs(wanted - given) <= Fraction(tolerance))


@reward(answer_only=True)
def small_world(record: Record, completion: str) -> float:
    """The gold score in [0, 1] of an answer to a question about the small world (`align.world`)."""
    return judge(record.prompt, completion).gold


@reward(answer_only=True)
def support_desk(record: Record, completion: str) -> float:
    """The gold score in [0, 1] of an answer to a row of the data sets named `desk-...` (`align.world`)."""
    return judge_answer(record.prompt, ExpectedAnswer.read(record.meta), completion).gold


# A character that continues a word; scripts from the CJK radicals on are written without spaces, so none does there.
_LETTER = r"[^\W\u2e80-\U0010ffff]"


@lru_cache(maxsize=4096)
def _whole_word(word: str) -> re.Pattern[str]:
    """A pattern that finds a word where no letter or digit continues it."""
    before, after = (re.match(_LETTER, letter) is not None for letter in (word[0], word[-1]))
    return re.compile(f"(?<!{_LETTER})" * before + re.escape(word) + f"(?!{_LETTER})" * after)


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


def _check_words(words: list[str]) -> list[str]:
    if not words or "" in words:
        raise ValueError("give words: [...], none of them empty")
    return words


def _as_words(scores: Any) -> Any:
    if not isinstance(scores, dict):
        return scores
    if truths := [key for key in scores if isinstance(key, bool)]:
        raise ValueError(f"YAML reads yes, no, on and off as {truths[0]}; put such words in quotes")
    return {str(word) if isinstance(word, int | float) else word: score for word, score in scores.items()}


def _check_scores(scores: dict[str, float]) -> dict[str, float]:
    if not scores or not all(word.strip() for word in scores):
        raise ValueError("give scores: {word: number}, no word of it empty")
    return scores


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Positive = Annotated[int, Field(gt=0)]
Words = Annotated[list[str], AfterValidator(_check_words)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
WordScores = Annotated[dict[str, Finite], BeforeValidator(_as_words), AfterValidator(_check_scores)]


@reward
def regex(record: Record, completion: str, pattern: Pattern, full: bool = False) -> float:
    """1 when the pattern is found in the completion, or with `full` matches all of it.

    It reads reasoning, too, as `<think>...</think>` before the answer.
    """
    match = re.fullmatch(pattern, completion.strip()) if full else re.search(pattern, completion)
    return float(match is not None)


@reward(answer_only=True)
def length(record: Record, completion: str, target: Positive, unit: Literal["words", "characters"] = "words") -> float:
    """1 at the target length, falling in a line to 0 at none and at twice the target; unit is words or characters."""
    size = len(completion.split()) if unit == "words" else len(completion)
    return max(0.0, 1 - abs(size - target) / target)


def _words_or_scores(
    words: list[str] | None = None, scores: dict[str, float] | None = None, ignore_case: bool = True
) -> None:
    if (words is None) == (scores is None):
        raise ValueError("give words: [...] or scores: {word: number}, one of the two")
    folded = Counter(map(str.casefold, scores or {}))
    if ignore_case and (twice := [word for word, count in folded.items() if count > 1]):
        raise ValueError(f"scores: {twice[0]} is there twice when case is ignored; keep one or set ignore_case: false")


@reward(check=_words_or_scores, answer_only=True)
def keyword(
    record: Record,
    completion: str,
    words: Words | None = None,
    scores: WordScores | None = None,
    ignore_case: bool = True,
) -> float:
    """The share of the words that occur in the completion, or with `scores` the sum of the scores of those that do.

    A word of `words` may be part of another; one that has a score is a word of its own, so that `no` is not in `not`.
    However often it occurs, it counts once.
    """
    fold = str.casefold if ignore_case else str
    text = fold(completion)
    if scores is not None:
        return sum(score for word, score in scores.items() if _whole_word(fold(word)).search(text))
    return sum(fold(word) in text for word in words or []) / len(words or [])
