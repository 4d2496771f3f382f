"""From an engine's token shift to what can be coloured: every piece of it is text that can be seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from align.engine.protocol import ShiftedToken


def merge_character_parts(tokens: Iterable[ShiftedToken]) -> list[ShiftedToken]:
    """The tokens of an answer, those that make up one character as one.

    A character's log-probability is the sum of its tokens'; its alternatives are what could have stood where it began.
    """
    pieces: list[ShiftedToken] = []
    begun: ShiftedToken | None = None
    for token in tokens:
        if begun is not None:
            logprob, base_logprob = begun.logprob + token.logprob, begun.base_logprob + token.base_logprob
            token = replace(begun, text=token.text, logprob=logprob, base_logprob=base_logprob)
        begun = None if token.text else token
        if begun is None:
            pieces.append(token)
    return pieces if begun is None else [*pieces, begun]
