"""Text to token ids in pieces encoded apart, so that what stands before a seam never depends on what follows."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

from align.data.templates import Rendering

_ANCHORS = ("\n", "=", "\x01", "a")
_BATCH = 2048

_NEEDS_ANCHOR: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def cut(rendering: Rendering) -> list[str]:
    """The rendered text cut at the start (and a known end) of every assistant turn; joined they are the text."""
    places = {0, len(rendering.text)}
    for span in rendering.spans:
        places.update([span.start] if span.end is None else [span.start, span.end])
    edges = sorted(places)
    return [rendering.text[start:end] for start, end in itertools.pairwise(edges)]


def encode_all(
    tokenizer: Any, texts: Sequence[str], seams: Sequence[str | None], opens: Sequence[bool]
) -> list[list[int]]:
    """Token ids of each text, none of them with added special tokens.

    Each text is encoded in parts at its seam, which itself disappears. `opens` says which texts start a document;
    the others continue one, which matters to tokenizers that put a space before everything they are given.
    """
    parts: list[str] = []
    owners: list[int] = []
    continued: list[bool] = []
    for index, (text, seam, first) in enumerate(zip(texts, seams, opens, strict=True)):
        for number, part in enumerate(text.split(seam) if seam else [text]):
            parts.append(part)
            owners.append(index)
            continued.append(number > 0 or not first)
    encoded = _encode(tokenizer, parts)
    if _puts_space_first(tokenizer):
        encoded = [
            _continue(tokenizer, text, ids) if more else ids
            for text, ids, more in zip(parts, encoded, continued, strict=True)
        ]
    results: list[list[int]] = [[] for _ in texts]
    for owner, ids in zip(owners, encoded, strict=True):
        results[owner] += ids
    return results


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    unique = list(dict.fromkeys(texts))  # both sides of a pair hold the same prompt
    ids: list[list[int]] = []
    for start in range(0, len(unique), _BATCH):
        batch = tokenizer(
            unique[start : start + _BATCH], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids += batch["input_ids"]
    known = dict(zip(unique, ids, strict=True))
    return [known[text] for text in texts]


def _puts_space_first(tokenizer: Any) -> bool:
    known = _NEEDS_ANCHOR.get(tokenizer)
    if known is None:
        twice = _encode(tokenizer, ["a"])[0] * 2
        known = _NEEDS_ANCHOR[tokenizer] = "aa" not in tokenizer.decode(twice, clean_up_tokenization_spaces=False)
    return known


def _continue(tokenizer: Any, text: str, alone: list[int]) -> list[int]:
    """Ids of a text that continues another: encoded behind an anchor that is then taken off again."""
    if not text:
        return []
    for anchor in _ANCHORS:
        head, whole = _encode(tokenizer, [anchor, anchor + text])
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return alone
