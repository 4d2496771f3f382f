"""Showing tokens as text with the trained ones marked, for `python -m align.data preview`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from align.data.render import render_demonstrations, render_preferences, render_prompts, render_texts
from align.errors import UsageError
from align.schema import Record, View

if TYPE_CHECKING:
    from rich.text import Text

_SHADES = ("black on green3", "black on dark_sea_green2")
_PLAIN_SHADES = ("", "dim")

Part = tuple[str, list[int], list[int]]
"""Title, token ids and a mask of the trained ones."""


def preview_parts(records: Sequence[Record], tokenizer: Any, view: View, max_length: int) -> Iterator[Part]:
    """What a stage would train on, row by row, as titled token lists with masks."""
    if view == "demonstration":
        for number, row in enumerate(render_demonstrations(records, tokenizer, max_length).rows, start=1):
            yield f"row {number}", row["input_ids"], row["completion_mask"]
    elif view == "preference":
        for number, row in enumerate(render_preferences(records, tokenizer, max_length).rows, start=1):
            for side in ("chosen", "rejected"):
                prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
                yield f"row {number} {side}", [*prompt, *answer], [0] * len(prompt) + [1] * len(answer)
    elif view == "text":
        for number, row in enumerate(render_texts(records, tokenizer, max_length).rows, start=1):
            yield f"block {number}", row["input_ids"], [1] * len(row["input_ids"])
    elif view == "prompt":
        for number, row in enumerate(render_prompts(records, tokenizer, max_length).rows, start=1):
            yield f"row {number}", row["prompt_ids"], [0] * len(row["prompt_ids"])
    else:
        raise UsageError(
            f"preview of the view {view} is not possible; give --view demonstration, which shows its masks"
        )


def mark_plain(ids: list[int], mask: list[int], tokenizer: Any) -> str:
    """The text of some tokens with every run of trained ones in double brackets."""
    pieces: list[str] = []
    for trained, run in _runs(ids, mask):
        text = _decode(tokenizer, run)
        pieces.append(f"[[{text}]]" if trained else text)
    return "".join(pieces)


def mark_colour(ids: list[int], mask: list[int], tokenizer: Any) -> Text:
    """The same for a terminal: trained tokens on green, neighbouring tokens in two shades."""
    from rich.text import Text

    marked = Text()
    for trained, run in _runs(ids, mask):
        for place, text in enumerate(_token_texts(tokenizer, run)):
            marked.append(text, style=(_SHADES if trained else _PLAIN_SHADES)[place % 2])
    return marked


def _runs(ids: list[int], mask: list[int]) -> Iterator[tuple[int, list[int]]]:
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            yield mask[start], ids[start:end]
            start = end


def _token_texts(tokenizer: Any, ids: list[int]) -> Iterator[str]:
    """The text of each token; tokens that are part of one character come together."""
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
