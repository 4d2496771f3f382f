"""Rewards that compare a completion with what the record asks for."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from align.rewards import reward
from align.schema import Record
from align.world import judge

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
    return _value(numbers[-1]) if numbers else None


def _value(match: re.Match[str]) -> Fraction:
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
