"""Who is asking: the language and the pseudonym a browser says it has, and the settings it sends."""

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
    """A browser's language and the pseudonym its votes are kept under; empty when it gave none that is one."""

    language: str
    voter: str

    @property
    def words(self) -> dict[str, str]:
        """The page's sentences in this visitor's language."""
        return PAGE_TEXTS[self.language]


def visitor_of(client: str | None) -> Visitor:
    """What the page's script says of a browser: `LANGUAGE|PSEUDONYM`."""
    language, _, voter = (client or "").partition("|")
    return Visitor(language_of(language), voter if _VOTER.fullmatch(voter) else "")


def read_settings(settings: Sequence[Any], usual: Sampling) -> tuple[Sampling, int | None]:
    """The sampling and the seed of the page's fields, in the order of `Asking.settings`; `usual` has the rest.

    Raises UsageError for an empty field and for values out of range.
    """
    *numbers, seed = settings
    seed = str(seed or "").strip()
    if any(number is None for number in numbers) or not (seed == "" or _SEED.fullmatch(seed)):
        raise UsageError("a sampling setting is empty or not a number; fill it in")
    temperature, top_p, top_k, min_p, penalty, most = map(float, numbers)
    sampling = replace(
        usual, temperature=temperature, top_p=top_p, top_k=int(top_k), min_p=min_p, repetition_penalty=penalty,
        max_new_tokens=int(most),
    )  # fmt: skip
    return sampling, int(seed) if seed else None
