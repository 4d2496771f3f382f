"""Every text of the page, in English and Chinese, and the visitor they are for, as a browser describes them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.engine.protocol import Sampling
from align.errors import UsageError

Words = dict[str, str]
PAGE_TEXTS: dict[str, Words] = {
    language: json.loads((Path(__file__).parent / "locales" / f"{language}.json").read_text(encoding="utf-8"))
    for language in ("en", "zh-CN")
}
_SEED = re.compile(r"[0-9]{1,18}")
_VOTER = re.compile(r"[\w-]{1,32}", re.ASCII)


def language_of(tag: str | None) -> str:
    """Return the language that a language tag, or a browser's Accept-Language header, asks for first."""
    first = (tag or "").split(",")[0].strip().lower()
    return "zh-CN" if first.startswith("zh") else "en"


def vote_key(choice: str, panes: int) -> str:
    """Return the key of a vote button's text."""
    if choice in ("tie", "bad"):
        return "bad_all" if choice == "bad" and panes > 2 else choice
    return f"{'better' if panes == 2 else 'best'}_{choice}"


@dataclass(frozen=True)
class Visitor:
    """A browser's language and the pseudonym of its votes, empty without a valid one."""

    language: str
    voter: str

    @property
    def words(self) -> Words:
        """The page's texts in this visitor's language."""
        return PAGE_TEXTS[self.language]


def visitor_of(client: str | None) -> Visitor:
    """Return the visitor from `LANGUAGE|PSEUDONYM`, as the page's script sends it."""
    language, _, voter = (client or "").partition("|")
    return Visitor(language_of(language), voter if _VOTER.fullmatch(voter) else "")


def read_settings(settings: Sequence[Any], defaults: Sampling) -> tuple[Sampling, int | None]:
    """Return sampling and seed from the page's fields, in the order of `CompareTab.settings`.

    Raises UsageError for an empty field and for values out of range.
    """
    *numbers, seed = settings
    seed = str(seed or "").strip()
    if any(number is None for number in numbers) or not (seed == "" or _SEED.fullmatch(seed)):
        raise UsageError("a sampling setting is empty or not a number; fill it in")
    temperature, top_p, top_k, min_p, penalty, max_new_tokens = map(float, numbers)
    sampling = replace(
        defaults, temperature=temperature, top_p=top_p, top_k=int(top_k), min_p=min_p, repetition_penalty=penalty,
        max_new_tokens=int(max_new_tokens),
    )  # fmt: skip
    return sampling, int(seed) if seed else None
