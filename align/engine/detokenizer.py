"""Incremental decoding of tokens to text, which never shows part of a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "�"
"""the replacement character, shown for bytes that are not a character"""

# A character is at most four bytes and a token at least one; an emoji sequence is a few characters. A longer run that
# still does not decode is not text, and is shown as it is.
_MAX_TOKENS = 16


def text_of(token: int, tokenizer: Any) -> str:
    """Return the text of a token within a text: tokenizers may drop the space before the first word."""
    first, both = (str(tokenizer.decode([token] * times)) for times in (1, 2))
    return both[len(first) :]


class Detokenizer:
    """Decodes one row token by token over a short window, so the cost of a token does not grow with the text.

    The window always begins with tokens already shown, because tokenizers treat the start of a text differently (they
    drop a leading space). `context` are the tokens of a text that is continued; a character that they only begin is
    shown with the tokens that end it. With `show_special`, control tokens are shown.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = (), *, show_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hides_special = not show_special
        self._ids = list(context[-_MAX_TOKENS:])
        self._before = len(self._ids)
        self._window = 0  # where the decoding window begins
        self._shown = self._before - self._open_tokens()  # tokens before this one are shown

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain, or an empty string."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._shown])
        after = self._decode(self._ids[self._window :])
        if after.endswith(INCOMPLETE) and len(self._ids) - self._shown < _MAX_TOKENS:
            return ""
        if len(after) <= len(before):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Return what was held back, at the end of the row."""
        before = self._decode(self._ids[self._window : self._shown])
        after = self._decode(self._ids[self._window :])
        self._window = self._shown = len(self._ids)
        return after[len(before) :]

    @property
    def count(self) -> int:
        """The number of tokens pushed."""
        return len(self._ids) - self._before

    def _open_tokens(self) -> int:
        """Return how many tokens at the end of the context are part of an unfinished character."""
        text = self._decode(self._ids)
        if not text.endswith(INCOMPLETE):
            return 0
        whole = text.rstrip(INCOMPLETE)
        sizes = range(1, len(self._ids) + 1)
        return next((size for size in sizes if self._decode(self._ids[:-size]) == whole), 0)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._hides_special)) if ids else ""
