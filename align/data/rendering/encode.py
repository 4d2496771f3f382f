"""Text to token ids in pieces encoded apart, so that the tokens before a cut never depend on what follows it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

from align.data.rendering.turn_spans import RenderedText

_ANCHORS = ("\n", "=", "\x01", "a")
_BATCH_TEXTS = 2048

_ADDS_SPACE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def split_at_turns(rendered: RenderedText) -> list[str]:
    """Return the text cut at the start (and a known end) of every assistant turn; joined they are the text."""
    edges = {0, len(rendered.text)}
    for span in rendered.spans:
        edges.update([span.start] if span.end is None else [span.start, span.end])
    return [rendered.text[start:end] for start, end in itertools.pairwise(sorted(edges))]


def encode_rendered(tokenizer: Any, rendered: Sequence[RenderedText]) -> list[list[list[int]]]:
    """Return the ids of each piece of each rendered conversation, cut at its turns."""
    pieces = [split_at_turns(conversation) for conversation in rendered]
    texts = [text for one in pieces for text in one]
    separators = [conversation.separator for conversation, one in zip(rendered, pieces, strict=True) for _ in one]
    opens = [number == 0 for one in pieces for number, _ in enumerate(one)]
    encoded = iter(encode_texts(tokenizer, texts, separators, opens))
    return [[next(encoded) for _ in one] for one in pieces]


def encode_texts(
    tokenizer: Any, texts: Sequence[str], separators: Sequence[str | None], opens: Sequence[bool]
) -> list[list[int]]:
    """Return the token ids of each text, without added special tokens.

    Each text is encoded in parts at its separator, which itself disappears. `opens` marks the texts that start a
    document; the others continue one, which matters to tokenizers that put a space before everything they are given.
    """
    parts: list[str] = []
    owners: list[int] = []
    continued: list[bool] = []
    for index, (text, separator, first) in enumerate(zip(texts, separators, opens, strict=True)):
        for number, part in enumerate(text.split(separator) if separator else [text]):
            parts.append(part)
            owners.append(index)
            continued.append(number > 0 or not first)
    encoded = _encode(tokenizer, parts)
    if _adds_space(tokenizer):
        encoded = [
            _encode_continuation(tokenizer, text, ids) if more else ids
            for text, ids, more in zip(parts, encoded, continued, strict=True)
        ]
    results: list[list[int]] = [[] for _ in texts]
    for owner, ids in zip(owners, encoded, strict=True):
        results[owner] += ids
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
