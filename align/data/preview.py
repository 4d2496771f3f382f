"""Tokens as text with the trained ones marked, for `align data preview`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from align.data.rendering.rendered_rows import RenderedRows

if TYPE_CHECKING:
    from rich.text import Text

_TRAINED_SHADES = ("black on green3", "black on dark_sea_green2")
_PLAIN_SHADES = ("", "dim")


def list_sequences(rendered: RenderedRows) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield (title, token ids, mask of the trained ones) of every sequence that a model reads.

    A row has one sequence (with a mask, or a block of text, or a bare prompt), or its prompt with each of its answers.
    """
    for number, row in enumerate(rendered.rows, start=1):
        if "input_ids" in row:
            ids = row["input_ids"]
            yield f"row {number}", ids, row.get("completion_mask", [1] * len(ids))
            continue
        prompt = row["prompt_ids"]
        answers = {key: ids for key, ids in row.items() if key.endswith("_ids") and key != "prompt_ids"}
        if not answers:
            yield f"row {number}", prompt, [0] * len(prompt)
        for key, ids in answers.items():
            side = key.removesuffix("_ids") if "label" not in row else "good" if row["label"] else "bad"
            yield f"row {number} {side}", [*prompt, *ids], [0] * len(prompt) + [1] * len(ids)


def mark_plain(ids: list[int], mask: list[int], tokenizer: Any) -> str:
    """Return the text of tokens with every run of trained ones in double brackets."""
    texts = ((trained, _decode(tokenizer, run)) for trained, run in _runs(ids, mask))
    return "".join(f"[[{text}]]" if trained else text for trained, text in texts)


def mark_colour(ids: list[int], mask: list[int], tokenizer: Any) -> Text:
    """Return the text of tokens for a terminal: trained ones on green, neighbours in two shades."""
    from rich.text import Text

    marked = Text()
    for trained, run in _runs(ids, mask):
        shades = _TRAINED_SHADES if trained else _PLAIN_SHADES
        for position, text in enumerate(_token_texts(tokenizer, run)):
            marked.append(text, style=shades[position % 2])
    return marked


def _runs(ids: list[int], mask: list[int]) -> Iterator[tuple[int, list[int]]]:
    for trained, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        yield trained, [token for token, _ in run]


def _token_texts(tokenizer: Any, ids: list[int]) -> Iterator[str]:
    """Yield the text of each token; tokens that are part of one character come together."""
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = _decode(tokenizer, held)
        if not text.endswith("\ufffd"):
            yield text
            held = []
    if held:
        yield _decode(tokenizer, held)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
