"""The text and the UTF-8 bytes of single tokens, parts of a character included."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from align.engine.detokenizer import INCOMPLETE, text_of

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""a byte token of SentencePiece's byte fallback"""


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
    if INCOMPLETE not in text:
        # Two tokens, because a tokenizer may drop the first space.
        shown = bool(tokenizer.decode([token, token], skip_special_tokens=True))
        return Spelling(text, text.encode("utf-8", "replace"), shown)
    raw = _bytes_of_piece(tokenizer.convert_ids_to_tokens(token))
    if raw is None:
        return Spelling(text, text.encode())
    return Spelling(raw.decode("utf-8", "replace"), raw)


def _bytes_of_piece(piece: Any) -> bytes | None:
    """Return the bytes that a vocabulary entry stands for; None when it is in no notation for bytes."""
    if isinstance(piece, bytes):  # tokenizers over tiktoken files
        return piece
    if not isinstance(piece, str):
        return None
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


def share_bytes(text: str, raws: list[bytes]) -> list[bytes]:
    """Return the bytes of some tokens in the text they made together, given their bytes in the vocabulary.

    Joined they are the UTF-8 of the text, except for invalid bytes, which the text shows as a replacement character.
    """
    whole, joined = text.encode("utf-8", "replace"), b"".join(raws)
    if joined == whole or (INCOMPLETE in text and _is_broken(joined)):
        return raws
    if joined.endswith(whole):  # a tokenizer that drops the space before the first word
        return _without_first(raws, len(joined) - len(whole))
    if joined and whole.endswith(joined):  # a character begun in the prompt
        return [whole[: len(whole) - len(joined)] + raws[0], *raws[1:]]
    return [*[b""] * (len(raws) - 1), whole]


def _is_broken(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return True
    return False


def sizes_of_characters(text: str, raw: bytes) -> list[int]:
    """Return how many bytes each character of the text stands for, replacement characters included."""
    sizes = _sizes_by_sequence(raw)
    if len(sizes) == len(text):
        return sizes
    # Some decoders write a replacement character for every byte of an invalid one.
    return [1 if char == INCOMPLETE else len(char.encode("utf-8", "replace")) for char in text]


def _sizes_by_sequence(raw: bytes) -> list[int]:
    sizes: list[int] = []
    while raw:
        try:
            sizes += [len(char.encode()) for char in raw.decode()]
            break
        except UnicodeDecodeError as error:
            sizes += [len(char.encode()) for char in raw[: error.start].decode()]
            sizes.append(error.end - error.start)
            raw = raw[error.end :]
    return sizes


def _without_first(raws: list[bytes], excess: int) -> list[bytes]:
    kept = []
    for raw in raws:
        kept.append(raw[excess:])
        excess = max(0, excess - len(raw))
    return kept
