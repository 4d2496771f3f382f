"""The judge of the small world: a program that knows the facts and what a good answer looks like.

It reads free text, not templates: a question is recognised by the product and the words it holds, and a completion
by the values it states, so what a model invents is judged as well as what the generators write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from align.errors import DataError, shorten
from align.schema import Messages, user
from align.world.facts import COLOURS, PRODUCTS, Attribute, Language, Product, Question
from align.world.wording import POLITE, RUDE

LENGTH_LIMIT = 14
"""words of a short answer; two Chinese characters count as one word"""

WEIGHTS = {"right_fact": 0.4, "polite": 0.3, "language": 0.15, "short": 0.15}

# The order matters: "how long can I return it" asks for returns although "how long" suggests a warranty.
_ASKS: dict[Attribute, str] = {
    "returns": r"return|send .*back|退",
    "warranty": r"warrant|guarantee|保修",
    "colour": r"colou?r|颜色",
    "price": r"price|cost|how much|pay|多少钱|价格|价钱",
}

_STATES: dict[Attribute, str] = {
    "price": r"(\d+)\s*(?:euros?\b|€|欧元)|€\s*(\d+)",
    "warranty": r"(\d+)[\s-]*(?:years?\b|年)",
    "returns": r"(\d+)[\s-]*(?:days?\b|天)",
    "colour": "|".join([rf"\b({name})\b" for name in COLOURS] + [f"({name})" for name in COLOURS.values()]),
}

_COLOUR_KEYS = {spelt: key for key, chinese in COLOURS.items() for spelt in (key, chinese)}
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[^\W_\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Verdict:
    """The judge's findings on one completion."""

    right_fact: bool
    """it states the true value, and no other, of the attribute and product of the question"""
    polite: bool
    """it contains a courtesy and nothing rude"""
    language: bool
    """it is in the language of the question"""
    short: bool
    """it has 1 to LENGTH_LIMIT words"""

    @property
    def gold(self) -> float:
        """The score in [0, 1]: the weighted share of the fulfilled criteria."""
        return sum(weight for name, weight in WEIGHTS.items() if getattr(self, name))


def judge(prompt: str | Messages, completion: str) -> Verdict:
    """Judge a completion of a prompt (its text, or messages of which the last user turn counts)."""
    question, folded = read_question(prompt), completion.casefold()
    found = [next(filter(None, match.groups())) for match in re.finditer(_STATES[question.attribute], folded)]
    stated = {_COLOUR_KEYS.get(value, value) for value in found}
    words, chinese = _count(completion)
    return Verdict(
        right_fact=stated == {question.truth} and set(_products(folded)) <= {question.product},
        polite=_mentions(folded, POLITE) and not _mentions(folded, RUDE),
        language=_language(completion) == question.language,
        short=0 < words + chinese / 2 <= LENGTH_LIMIT,
    )


def read_question(prompt: str | Messages) -> Question:
    """Recognise product, attribute and language of a question, or raise DataError."""
    messages = [user(prompt)] if isinstance(prompt, str) else prompt
    text = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    folded, language = text.casefold(), _language(text)
    products = _products(folded)
    attribute = next((name for name, pattern in _ASKS.items() if re.search(pattern, folded)), None)
    if len(products) != 1 or attribute is None or language is None:
        raise DataError(
            f"judge {shorten(text)}; it asks for no fact of the small world; "
            "name one product and its price, warranty, returns or colour"
        )
    return Question(products[0], attribute, language)


def _products(folded: str) -> list[Product]:
    return [
        product for product in PRODUCTS if product.zh in folded or re.search(rf"\b{product.en}s?\b", folded, re.ASCII)
    ]


def _mentions(folded: str, table: dict[Language, tuple[str, ...]]) -> bool:
    phrases = (phrase for language in table.values() for phrase in language)
    return any(phrase.casefold().rstrip("!.。！") in folded for phrase in phrases)


def _count(text: str) -> tuple[int, int]:
    """Return the numbers of words and of Chinese characters."""
    return len(_WORD.findall(text)), len(_CHINESE.findall(text))


def _language(text: str) -> Language | None:
    words, chinese = _count(text)
    if chinese == words == 0:
        return None
    # A Chinese sentence holds numbers, an English one holds no Chinese characters to speak of.
    return "zh" if chinese > words else "en"
