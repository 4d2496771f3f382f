"""The text of one row: decoded token by token, shown when it is certain, with the UTF-8 bytes of each token."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from align.engine.protocol import NO_RULES, Alternative, Token, TokenRules

_INCOMPLETE = "�"
"""the replacement character, shown for bytes that are not a character"""

# A character is at most four bytes and a token at least one; an emoji sequence is a few characters. A longer run that
# still does not decode is not text, and is shown as it is.
_MAX_TOKENS = 16

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""a byte token of SentencePiece's byte fallback"""


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
        return self.flush(last=False)

    def flush(self, *, last: bool = True) -> str:
        """Return what was held back, at the end of the row; before it only what is certain."""
        before, after = self._decode(self._ids[self._window : self._shown]), self._decode(self._ids[self._window :])
        is_open = after.endswith(_INCOMPLETE) and len(self._ids) - self._shown < _MAX_TOKENS
        if (is_open and not last) or len(after) <= len(before):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    @property
    def count(self) -> int:
        """The number of tokens pushed."""
        return len(self._ids) - self._before

    def _open_tokens(self) -> int:
        """Return how many tokens at the end of the context are part of an unfinished character."""
        text = self._decode(self._ids)
        if not text.endswith(_INCOMPLETE):
            return 0
        whole = text.rstrip(_INCOMPLETE)
        sizes = range(1, len(self._ids) + 1)
        return next((size for size in sizes if self._decode(self._ids[:-size]) == whole), 0)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._hides_special)) if ids else ""


class Spelling(NamedTuple):
    """A token within a text."""

    text: str
    """with a replacement character where its bytes are not whole characters"""
    raw: bytes
    in_answers: bool = True
    """False for a control token, which has a name but no text in an answer"""


_CACHE: WeakKeyDictionary[Any, dict[int, Spelling]] = WeakKeyDictionary()
"""by tokenizer"""


def spell_token(token: int, tokenizer: Any) -> Spelling:
    """Return the text and bytes of a token; of one without text, such as an end token, its name."""
    spellings = _CACHE.setdefault(tokenizer, {})
    if token not in spellings:
        spellings[token] = _spell(token, tokenizer)
    return spellings[token]


def _spell(token: int, tokenizer: Any) -> Spelling:
    text = text_of(token, tokenizer)
    if _INCOMPLETE not in text:
        # Two tokens, because a tokenizer may drop the first space.
        shown = bool(tokenizer.decode([token, token], skip_special_tokens=True))
        return Spelling(text, text.encode("utf-8", "replace"), shown)
    raw = _bytes_of_piece(tokenizer.convert_ids_to_tokens(token))
    return Spelling(text, text.encode()) if raw is None else Spelling(raw.decode("utf-8", "replace"), raw)


def text_of(token: int, tokenizer: Any) -> str:
    """Return the text of a token within a text: tokenizers may drop the space before the first word."""
    first, both = (str(tokenizer.decode([token] * times)) for times in (1, 2))
    return both[len(first) :]


def _bytes_of_piece(piece: Any) -> bytes | None:
    """Return the bytes that a vocabulary entry stands for; None when it is in no notation for bytes."""
    if not isinstance(piece, str):
        return piece if isinstance(piece, bytes) else None  # bytes from tokenizers over tiktoken files
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    alphabet = _byte_level_alphabet()
    return bytes(alphabet[char] for char in piece) if all(char in alphabet for char in piece) else None


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE (Radford et al. 2019): printable bytes are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def locate_tokens(
    tokens: Sequence[Token], text: str, before: int, tokenizer: Any, *, names: bool = False
) -> tuple[list[Token], list[int]]:
    """Return tokens with their bytes and offsets in the text they made together, which begins at `before`.

    Also the number of bytes of each of its characters. With `names`, control tokens have their name in the text.
    """
    spellings = [spell_token(token.id, tokenizer) for token in tokens]
    raws = _share_bytes(text, [one.raw if names or one.in_answers else b"" for one in spellings])
    sizes = _sizes_of_characters(text, b"".join(raws))
    ends = list(accumulate(sizes))
    located, begin = [], 0
    for token, spelling, raw in zip(tokens, spellings, raws, strict=True):
        start = before + bisect_right(ends, begin)
        shown = raw.decode("utf-8", "replace") if names or spelling.in_answers else token.text
        located.append(replace(token, text=shown, raw=raw, start=start, top=_alike(token.top, spelling.raw, raw)))
        begin += len(raw)
    return located, sizes


def _share_bytes(text: str, raws: list[bytes]) -> list[bytes]:
    """Return the bytes of some tokens in the text they made together, given their bytes in the vocabulary.

    Joined they are the UTF-8 of the text, except for invalid bytes, which the text shows as a replacement character.
    """
    whole, joined = text.encode("utf-8", "replace"), b"".join(raws)
    # Decoded and encoded again, only invalid bytes differ.
    if joined == whole or (_INCOMPLETE in text and joined.decode("utf-8", "replace").encode() != joined):
        return raws
    if joined.endswith(whole):  # a tokenizer that drops the space before the first word
        excess, ends = len(joined) - len(whole), accumulate(map(len, raws), initial=0)
        return [raw[max(0, excess - begin) :] for raw, begin in zip(raws, ends, strict=False)]
    if joined and whole.endswith(joined):  # a character begun in the prompt
        return [whole[: len(whole) - len(joined)] + raws[0], *raws[1:]]
    return [*[b""] * (len(raws) - 1), whole]


def _sizes_of_characters(text: str, raw: bytes) -> list[int]:
    """Return how many bytes each character of the text stands for, replacement characters included."""
    sizes: list[int] = []
    while raw:
        try:
            sizes += [len(char.encode()) for char in raw.decode()]
            break
        except UnicodeDecodeError as error:
            sizes += [*(len(char.encode()) for char in raw[: error.start].decode()), error.end - error.start]
            raw = raw[error.end :]
    if len(sizes) == len(text):
        return sizes
    # Some decoders write a replacement character for every byte of an invalid one.
    return [1 if char == _INCOMPLETE else len(char.encode("utf-8", "replace")) for char in text]


def _alike(top: tuple[Alternative, ...], raw: bytes, kept: bytes) -> tuple[Alternative, ...]:
    """Return alternatives without the space that the token lost at the start of the text."""
    lost = raw.removesuffix(kept)
    if not lost or lost.strip(b" "):
        return top
    return tuple(
        one._replace(text=one.text[len(lost) :], raw=one.raw[len(lost) :]) if one.raw.startswith(lost) else one
        for one in top
    )


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
        self._min_tokens, self._names = rules.min_tokens, rules.show_special_tokens
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
        self._stops, self._include = stops, include
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
