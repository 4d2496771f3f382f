"""Text to token ids in pieces encoded apart, so that the tokens before a cut never depend on what follows it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from align.data.rendering.turn_spans import RenderedText

_ANCHORS = ("\n", "=", "\x01", "a")
_BATCH_TEXTS = 2048

_ADDS_SPACE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def encode_rendered(tokenizer: Any, rendered: Sequence[RenderedText]) -> list[list[list[int]]]:
    """Return the ids of each piece of each rendered text, without added special tokens.

    A piece is encoded in parts at its separator, which itself disappears. Those that continue a text matter to
    tokenizers that put a space before everything they are given.
    """
    results: list[list[list[int]]] = []
    parts: list[tuple[str, bool, list[int]]] = []  # text, whether it continues another, and where its ids go
    for text in rendered:
        pieces = text.pieces()
        results.append([[] for _ in pieces])
        for piece, ids in zip(pieces, results[-1], strict=True):
            for number, part in enumerate(piece.split(text.separator) if text.separator else [piece]):
                parts.append((part, number > 0 or ids is not results[-1][0], ids))
    adds_space = _adds_space(tokenizer)
    for (part, continues, ids), encoded in zip(parts, _encode(tokenizer, [part for part, *_ in parts]), strict=True):
        ids += _encode_continuation(tokenizer, part, encoded) if adds_space and continues else encoded
    return results


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    unique = list(dict.fromkeys(texts))  # both sides of a pair hold the same prompt
    ids: list[list[int]] = []
    for start in range(0, len(unique), _BATCH_TEXTS):
        batch = tokenizer(
            unique[start : start + _BATCH_TEXTS], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids += batch["input_ids"]
    by_text = dict(zip(unique, ids, strict=True))
    return [by_text[text] for text in texts]


def _adds_space(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a space before every text."""
    if tokenizer not in _ADDS_SPACE:
        twice = _encode(tokenizer, ["a"])[0] * 2
        _ADDS_SPACE[tokenizer] = "aa" not in tokenizer.decode(twice, clean_up_tokenization_spaces=False)
    return _ADDS_SPACE[tokenizer]


def _encode_continuation(tokenizer: Any, text: str, alone: list[int]) -> list[int]:
    """Return the ids of a text that continues another: encoded behind an anchor that is then taken off again."""
    if not text:
        return []
    for anchor in _ANCHORS:
        head, whole = _encode(tokenizer, [anchor, anchor + text])
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return alone
