"""Showing tokens as text with the trained ones marked, for `align data preview`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from align.data.rendering.answer_rows import render_preferences, render_unpaired
from align.data.rendering.conversation_rows import render_demonstrations, render_prompts
from align.data.rendering.document_rows import render_texts
from align.data.rendering.rendered_rows import RenderedRows
from align.schema import Record, View

if TYPE_CHECKING:
    from rich.text import Text

_SHADES = ("black on green3", "black on dark_sea_green2")
_PLAIN_SHADES = ("", "dim")

_RENDERERS: dict[View, Callable[..., RenderedRows]] = {
    "demonstration": render_demonstrations,
    "preference": render_preferences,
    "unpaired": render_unpaired,
    "prompt": render_prompts,
    "text": render_texts,
}

Part = tuple[str, list[int], list[int]]
"""Title, token ids and a mask of the trained ones."""


def render_view(records: Sequence[Record], tokenizer: Any, view: View, max_length: int) -> RenderedRows:
    """The rows of a view as a stage would train them; DataError when none is left."""
    return _RENDERERS[view](records, tokenizer, max_length)


def parts_of(rendered: RenderedRows) -> Iterator[Part]:
    """RenderedRows rows as titled token lists with masks."""
    for number, row in enumerate(rendered.rows, start=1):
        yield from _parts(row, number)


def _parts(row: dict[str, Any], number: int) -> Iterator[Part]:
    """The sequences of one row: a masked one, a block without a mask, a bare prompt, or a prompt with each answer."""
    if "input_ids" in row:
        ids = row["input_ids"]
        yield f"row {number}", ids, row.get("completion_mask", [1] * len(ids))
        return
    prompt = row["prompt_ids"]
    answers = {key: ids for key, ids in row.items() if key.endswith("_ids") and key != "prompt_ids"}
    if not answers:
        yield f"row {number}", prompt, [0] * len(prompt)
    for key, ids in answers.items():
        side = key.removesuffix("_ids") if "label" not in row else "good" if row["label"] else "bad"
        yield f"row {number} {side}", [*prompt, *ids], [0] * len(prompt) + [1] * len(ids)


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
