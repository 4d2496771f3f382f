"""The language, pseudonym and sampling settings that a browser sends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.arena.page_text import PAGE_TEXTS, language_of
from align.engine.protocol import Sampling
from align.errors import UsageError

_SEED = re.compile(r"[0-9]{1,18}")
_VOTER = re.compile(r"[\w-]{1,32}", re.ASCII)


@dataclass(frozen=True)
class Visitor:
    """A browser's language and the pseudonym of its votes, empty without a valid one."""

    language: str
    voter: str

    @property
    def words(self) -> dict[str, str]:
        """The page's texts in this visitor's language."""
        return PAGE_TEXTS[self.language]


def visitor_of(client: str | None) -> Visitor:
    """Return the visitor from `LANGUAGE|PSEUDONYM`, as the page's script sends it."""
    language, _, voter = (client or "").partition("|")
    return Visitor(language_of(language), voter if _VOTER.fullmatch(voter) else "")


def read_settings(settings: Sequence[Any], defaults: Sampling) -> tuple[Sampling, int | None]:
    """Return sampling and seed from the page's fields, in the order of `PromptControls.settings`.

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
