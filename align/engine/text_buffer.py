"""What one row has said: tokens to text that may be shown, held back where it may turn out otherwise."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

from align.engine.detokenizer import Detokenizer
from align.engine.protocol import Alternative, Token
from align.engine.token_rules import NO_RULES, TokenRules
from align.engine.vocabulary import share_bytes, sizes_of_characters, spell_token


class TextChunk(NamedTuple):
    """New text to show and the tokens it came from, when they are told."""

    text: str
    tokens: tuple[Token, ...] = ()


class _Span(NamedTuple):
    """A token, and where its bytes begin in those of the answer."""

    token: Token
    start: int


class TextBuffer:
    """Tokens in, pieces of text out: never half a character, never a stop string nor the beginning of one."""

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], context: Sequence[int] = (), rules: TokenRules = NO_RULES
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, context, show_special=rules.show_special_tokens)
        self._stops = StopStrings(stops, rules.include_stop)
        self._min_tokens = rules.min_tokens
        self._names = rules.show_special_tokens
        self._group: list[Token] = []
        self._spans: list[_Span] = []
        self._decoded = self._placed_bytes = self._shown_bytes = 0
        self._sizes: list[int] = []  # in bytes, of the characters that are not shown
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

    def push(self, token: int, told: Token | None = None) -> TextChunk:
        """Add a token, and what is to be told of it; return what may now be shown."""
        if told is not None:
            self._group.append(told)
        text = self._detokenizer.push(token)
        self._place(text)
        # What comes before the fewest tokens is neither a stop string nor the beginning of one.
        return self._show(text if self.count <= self._min_tokens else self._stops.push(text))

    def close(self) -> TextChunk:
        """What was held back, at the end."""
        if self.stopped:
            return TextChunk("")
        text = self._detokenizer.flush()
        self._place(text, last=True)
        shown = self._stops.push(text)
        return self._show(shown + self._stops.flush(), last=not self.stopped)

    def _place(self, text: str, *, last: bool = False) -> None:
        """Give the tokens that made some text together their bytes and their place in it."""
        if self._group and (text or last):
            placed = locate_tokens(self._group, text, self._decoded, self._tokenizer, names=self._names)
            for token in placed.tokens:
                self._spans.append(_Span(token, self._placed_bytes))
                self._placed_bytes += len(token.raw)
            self._sizes += placed.sizes
            self._group = []
        self._decoded += len(text)

    def _show(self, text: str, *, last: bool = False) -> TextChunk:
        if not (text or last or self.stopped):
            return TextChunk("")
        self.text += text
        self._shown_bytes += sum(self._sizes[: len(text)])
        del self._sizes[: len(text)]
        # Only what comes after a stop string is not told: a token that it cut in two was shown in part.
        most = self._shown_bytes
        told = [
            _cut(token, most - start)
            for token, start in self._spans
            if last or start + len(token.raw) <= most or (self.stopped and start < most)
        ]
        del self._spans[: len(told)]
        return TextChunk(text, tuple(told))


class LocatedTokens(NamedTuple):
    """Tokens with their bytes and places in the text they made, and how many bytes each character of it has."""

    tokens: list[Token]
    sizes: list[int]


def locate_tokens(
    tokens: Sequence[Token], text: str, before: int, tokenizer: Any, *, names: bool = False
) -> LocatedTokens:
    """Tokens that made some text together, placed in it; `before` characters stand before that text.

    With `names`, control tokens have their name in the text.
    """
    spellings = [spell_token(token.id, tokenizer) for token in tokens]
    raws = share_bytes(text, [each.raw if names or each.in_answers else b"" for each in spellings])
    sizes = sizes_of_characters(text, b"".join(raws))
    ends = list(accumulate(sizes))
    found, begin = [], 0
    for token, spelling, raw in zip(tokens, spellings, raws, strict=True):
        start = before + bisect_right(ends, begin)
        said = raw.decode("utf-8", "replace") if names or spelling.in_answers else token.text
        found.append(replace(token, text=said, raw=raw, start=start, top=_alike(token.top, spelling.raw, raw)))
        begin += len(raw)
    return LocatedTokens(found, sizes)


def _alike(top: tuple[Alternative, ...], raw: bytes, kept: bytes) -> tuple[Alternative, ...]:
    """Alternatives without what a token lost at the start of a text: the space before the first word."""
    lost = raw.removesuffix(kept)
    if not lost or lost.strip(b" "):
        return top
    return tuple(
        each._replace(text=each.text[len(lost) :], raw=each.raw[len(lost) :]) if each.raw.startswith(lost) else each
        for each in top
    )


def _cut(token: Token, size: int) -> Token:
    """A token with so many of its bytes at most."""
    if size >= len(token.raw):
        return token
    return replace(token, raw=token.raw[:size], text=token.raw[:size].decode("utf-8", "replace"))


class StopStrings:
    """Lets text through up to the first stop string, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """With `include`, the stop string that was found is let through too."""
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text and return what may be shown now; nothing more is once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.found = bool(found)
        if not found:
            return self._let_go(len(self._held) - self._beginning())
        place, stop = min(found)
        return self._let_go(place + len(stop) if self._include else place)

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
