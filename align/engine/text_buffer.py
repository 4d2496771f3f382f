"""The text of one row: what is certain is shown, what may still change is held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from align.engine.detokenizer import Detokenizer, locate_tokens
from align.engine.protocol import NO_RULES, Token, TokenRules


class TextChunk(NamedTuple):
    """New text to show, and its tokens for rows with `logprobs`."""

    text: str
    tokens: tuple[Token, ...] = ()


class TextBuffer:
    """Takes tokens and returns chunks of text, never with part of a character or of a stop string."""

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], context: Sequence[int] = (), rules: TokenRules = NO_RULES
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, context, show_special=rules.show_special_tokens)
        self._stops = StopStrings(stops, rules.include_stop)
        self._min_tokens = rules.min_tokens
        self._names = rules.show_special_tokens
        self._group: list[Token] = []
        self._spans: list[tuple[Token, int]] = []  # a token, and where its bytes begin in those of the completion
        self._decoded = self._located_bytes = self._shown_bytes = 0
        self._sizes: list[int] = []  # in bytes, of the characters that are not shown
        self.text = ""
        """all text shown so far"""

    @property
    def count(self) -> int:
        """The number of tokens pushed."""
        return self._detokenizer.count

    @property
    def stopped(self) -> bool:
        """Return whether a stop string was found."""
        return self._stops.found

    def push(self, token: int, scored: Token | None = None) -> TextChunk:
        """Add a token, for rows with `logprobs` with its log-probability; return what may now be shown."""
        if scored is not None:
            self._group.append(scored)
        text = self._detokenizer.push(token)
        self._locate(text)
        # Text of the first `min_tokens` is neither a stop string nor the beginning of one.
        return self._show(text if self.count <= self._min_tokens else self._stops.push(text))

    def close(self) -> TextChunk:
        """Return what was held back, at the end of the row."""
        if self.stopped:
            return TextChunk("")
        text = self._detokenizer.flush()
        self._locate(text, last=True)
        shown = self._stops.push(text)
        return self._show(shown + self._stops.flush(), last=not self.stopped)

    def _locate(self, text: str, *, last: bool = False) -> None:
        """Give the tokens that made some text together their bytes and offsets in it."""
        if self._group and (text or last):
            tokens, sizes = locate_tokens(self._group, text, self._decoded, self._tokenizer, names=self._names)
            for token in tokens:
                self._spans.append((token, self._located_bytes))
                self._located_bytes += len(token.raw)
            self._sizes += sizes
            self._group = []
        self._decoded += len(text)

    def _show(self, text: str, *, last: bool = False) -> TextChunk:
        if not (text or last or self.stopped):
            return TextChunk("")
        self.text += text
        self._shown_bytes += sum(self._sizes[: len(text)])
        del self._sizes[: len(text)]
        # A token that a stop string cut in two was shown in part; those after it were not.
        most = self._shown_bytes
        shown = [
            _cut(token, most - start)
            for token, start in self._spans
            if last or start + len(token.raw) <= most or (self.stopped and start < most)
        ]
        del self._spans[: len(shown)]
        return TextChunk(text, tuple(shown))


def _cut(token: Token, size: int) -> Token:
    """Return a token with at most `size` of its bytes."""
    if size >= len(token.raw):
        return token
    return replace(token, raw=token.raw[:size], text=token.raw[:size].decode("utf-8", "replace"))


class StopStrings:
    """Passes text on up to the first stop string, with `include` up to its end, however the text is cut into chunks."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text and return what may be shown now; nothing more is once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        if matches := [(index, stop) for stop in self._stops if (index := self._held.find(stop)) >= 0]:
            self.found = True
            index, stop = min(matches)
            return self._release(index + len(stop) if self._include else index)
        # What may be the beginning of a stop string stays.
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        ends = range(longest, 0, -1)
        begun = next((size for size in ends if any(stop.startswith(self._held[-size:]) for stop in self._stops)), 0)
        return self._release(len(self._held) - begun)

    def flush(self) -> str:
        """Return what is still held back at the end of the text."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown
