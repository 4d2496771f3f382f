"""The judge of the support desk: reads free text for the values it states, and compares them with the handbook page.

It does not know the generator's wordings. Numbers may be words, units have synonyms, and refusals are recognised by
what they say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align.errors import DataError
from align.schema import Messages
from align.world.desk_facts import COLOURS, TOPICS, page_of, products_in

Kind = Literal["fact", "distractor", "follow_up", "unknown", "chat"]
Quantity = tuple[str, str]
"""value and unit; the unit is "" for a number without one"""

WEIGHTS = {"right": 0.5, "courteous": 0.25, "short": 0.25}
WORD_LIMIT = 30
"""words of a short answer"""

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_NUMBER_WORDS = {word: number for number, word in enumerate(_ONES)} | _TENS
_SPELT = re.compile(
    rf"\b({'|'.join(_TENS)})[- ]({'|'.join(_ONES[1:10])})\b|\b({'|'.join(sorted(_NUMBER_WORDS.keys() - {'one'}))})\b"
    r"|\bone(?= (?:euros?|years?|kilo|days?|weeks?|hours?|months?)\b)"
)
_UNITS = {
    "euros": r"euros?|eur|€",
    "years": r"years?|yrs?",
    "kilos": r"kilos?|kilograms?|kgs?",
    "days": r"days?",
    "weeks": r"weeks?",
    "percent": r"percent|per cent|%",
    "months": r"months?",
    "hours": r"hours?|hrs?",
    "o'clock": r"o['’]?\s?clock|a\.?m\b\.?|:00",
}
_QUANTITY = re.compile(
    r"€\s?(?P<euros_before>\d+(?:\.\d+)?)|(?P<number>\d+(?:[.,]\d+)*)[\s-]*(?:"
    + "|".join(f"(?P<u{index}>{unit})(?![a-z])" for index, unit in enumerate(_UNITS.values()))
    + ")?"
)
_COLOUR = re.compile(rf"\b({'|'.join((*COLOURS, 'gray'))})\b")
_REFUSES = re.compile(
    r"\b(?:do|does|did|can|could|am|is|are)(?: not|n['’]t|not) (?:\w+ ){0,2}?"
    r"(?:know|have (?:that|this|any|the|it|information)|say|mention|tell|find|contain|list|sure|able|in (?:my|the|our))"
    r"|\b(?:cannot|can['’]?t|unable to) (?:\w+ )?(?:say|tell|find|answer|help|see|provide)"
    r"|\bno (?:idea|information|details)\b|\bpass(?:ed|ing)? (?:\w+ ){1,4}(?:on|along|to)\b"
    r"|\b(?:ask|forward|refer|check with|escalate)\w* (?:\w+ ){0,5}colleagues?\b|\bunknown to (?:me|us)\b"
    r"|\bnot (?:mentioned|listed|stated|specified|provided|available) (?:in|on|by)\b"
)
_COURTEOUS = re.compile(
    r"\b(?:happy|glad|pleased) to (?:help|assist|hear|tell)|\bgladly\b|\bof course\b|\bcertainly\b|\bthank(?:s| you)\b|"
    r"\bplease\b|\bwelcome\b|\bpleasure\b|\bsorry\b|\bapolog|\bsure[,!]|\bafraid\b|\bunfortunately\b|"
    r"\bhave a (?:nice|good|great|lovely|wonderful)\b|\blet (?:me|us) know\b|\bdear customer\b|"
    r"\bhope (?:this|that|it) helps\b"
)
_RUDE = re.compile(
    r"\bread the page\b|\bnot this again\b|\bwhatever\b|\bstop asking\b|\bobviously\b|\bstupid\b|\byour problem\b|"
    r"\bwaste of\b|\bno idea\b|\bwho cares\b|\bgo away\b"
)
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")


@dataclass(frozen=True)
class ExpectedAnswer:
    """A good answer to the last turn: it states `truth`, refuses (unknown), or states no fact (chat)."""

    kind: Kind
    topic: str = ""
    """of the question; "" for chat and for what no handbook has"""
    product: str = ""
    truth: str = ""

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> ExpectedAnswer:
        """Return what a row of the desk's files expects; DataError for another row."""
        try:
            return cls(*(str(meta[key]) for key in ("kind", "topic", "product", "truth")))  # type: ignore[arg-type]
        except KeyError as missing:
            raise DataError(
                f"not a row of the desk-... data sets: no column {missing}; take desk-prompts or desk-prompts-eval"
            ) from None


@dataclass(frozen=True)
class DeskVerdict:
    """The judge's findings on one answer."""

    right: bool
    """the true value and no wrong one, an honest refusal where the page has none, or no fact at all in small talk"""
    courteous: bool
    short: bool

    @property
    def gold(self) -> float:
        """The score in [0, 1]: the weighted share of the fulfilled criteria."""
        return sum(weight for name, weight in WEIGHTS.items() if getattr(self, name))


def judge_answer(prompt: Messages, expected: ExpectedAnswer, completion: str) -> DeskVerdict:
    """Judge an answer to a conversation whose system message holds the page."""
    text = completion.casefold()
    page = page_of(next((turn["content"] for turn in prompt if turn["role"] == "system"), ""))
    words = len(_WORD.findall(completion))
    return DeskVerdict(
        right=words > 0 and _is_right(text, expected, set(quantities(page.casefold()))),
        courteous=_COURTEOUS.search(text) is not None and _RUDE.search(text) is None,
        short=0 < words <= WORD_LIMIT,
    )


def quantities(text: str) -> list[Quantity]:
    """Return the numbers with their units, and the colours, that a text in lower case states."""
    found = []
    for match in _QUANTITY.finditer(_SPELT.sub(_digits, text)):
        number = match["euros_before"] or match["number"]
        unit = next((name for index, name in enumerate(_UNITS) if match[f"u{index}"]), "")
        found.append((_plain(number), "euros" if match["euros_before"] else unit))
    return found + [(colour.replace("gray", "grey"), "colour") for colour in _COLOUR.findall(text)]


def refuses(text: str) -> bool:
    """Return whether a text in lower case says that it does not know or passes the question on."""
    return _REFUSES.search(text) is not None


def _is_right(text: str, expected: ExpectedAnswer, on_page: set[Quantity]) -> bool:
    stated = set(quantities(text))
    unit = TOPICS[expected.topic].unit if expected.topic else None
    other_products = products_in(text) - {expected.product}
    if expected.kind == "chat":
        return not stated and not refuses(text)
    # Beside the answer only what the page says, in other units: a second price is a wrong one.
    aside = {one for one in stated if one[1] != unit and one in on_page}
    if expected.kind == "unknown":
        return refuses(text) and stated == aside
    truth = {(expected.truth, unit), (expected.truth, "")}
    if expected.product and other_products:
        return False
    return bool(stated & truth) and stated <= aside | truth and not refuses(text)


def _digits(match: re.Match[str]) -> str:
    tens, ones, single = match.groups()
    if tens:
        return str(_TENS[tens] + _ONES.index(ones))
    return str(_NUMBER_WORDS[single]) if single else "1"


def _plain(number: str) -> str:
    """Return a number without zeros behind its point, and without zeros in front."""
    number = number.replace(",", "")
    whole, _, decimals = number.partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
