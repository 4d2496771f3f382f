"""What one row has said: tokens to text that may be shown, held back where it may turn out otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from align.engine.detokenizer import Detokenizer
from align.engine.protocol import Token


class Piece(NamedTuple):
    """New text to show and the tokens it came from, when they are told."""

    text: str
    tokens: tuple[Token, ...] = ()


class _Span(NamedTuple):
    """A token and the part of the text it made, in characters."""

    token: Token
    start: int
    end: int


class Speech:
    """Tokens in, pieces of text out: never half a character, never a stop string nor the beginning of one."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._spans: list[_Span] = []
        self._decoded = 0
        self.text = ""
        """all that was shown"""

    @property
    def count(self) -> int:
        """How many tokens came."""
        return self._detokenizer.count

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stops.found

    def push(self, token: int, told: Token | None = None) -> Piece:
        """Add a token, and what is to be told of it; return what may now be shown."""
        text = self._detokenizer.push(token)
        start, self._decoded = self._decoded, self._decoded + len(text)
        if told is not None:
            self._spans.append(_Span(told, start, self._decoded))
        return self._show(self._stops.push(text))

    def close(self) -> Piece:
        """What was held back, at the end."""
        if self.stopped:
            return Piece("")
        shown = self._stops.push(self._detokenizer.flush())
        return self._show(shown + self._stops.flush(), last=not self.stopped)

    def _show(self, text: str, *, last: bool = False) -> Piece:
        if not text and not last:
            return Piece("")
        self.text += text
        end = len(self.text)
        # A token that a stop string cut in two was shown in part, and is told.
        told = [span.token for span in self._spans if last or span.end <= end or (self.stopped and span.start < end)]
        del self._spans[: len(told)]
        return Piece(text, tuple(told))


class StopStrings:
    """Lets text through up to the first stop string, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text and return what may be shown now; nothing more is once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        self.found = bool(places)
        return self._let_go(min(places) if places else len(self._held) - self._beginning())

    def flush(self) -> str:
        """What is still held at the end of the text."""
        return "" if self.found else self._let_go(len(self._held))

    def _let_go(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _beginning(self) -> int:
        """How many characters at the end of the text begin a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        ends = range(longest, 0, -1)
        return next((size for size in ends if any(stop.startswith(self._held[-size:]) for stop in self._stops)), 0)
