"""Records of a view as rows of token ids, the way a stage trains them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from align.config import OnLong
from align.data.rendering.answer_rows import preference_rows, unpaired_rows
from align.data.rendering.conversation_rows import demonstration_rows, prompt_rows
from align.data.rendering.document_rows import NOT_FULL, document_rows, pack_blocks
from align.data.rendering.fit_length import LengthLimit
from align.data.rendering.rendered_rows import RenderedRows, Renderer, RowCollector
from align.schema import Record, View

RENDERERS: dict[View, Renderer] = {
    "demonstration": demonstration_rows,
    "preference": preference_rows,
    "unpaired": unpaired_rows,
    "prompt": prompt_rows,
    "text": document_rows,
}


def render_view(
    view: View, records: Sequence[Record], tokenizer: Any, max_length: int, on_long: OnLong = "drop"
) -> RenderedRows:
    """Return the rows of records; `max_length` is the length of a block for the view `text`.

    Raises DataError when no row is left, or demonstrations never train a stop token.
    """
    rendered = RENDERERS[view](records, tokenizer, LengthLimit(max_length, on_long))
    if view == "text":
        rendered = _pack_documents(rendered, max_length)
    return rendered.usable(stops=view == "demonstration")


def _pack_documents(documents: RenderedRows, block_size: int) -> RenderedRows:
    """Return documents packed into blocks; the last one is dropped when it is not full, unless it is the only one."""
    collector = RowCollector()
    collector.dropped += Counter(documents.dropped)
    for block in pack_blocks((row["input_ids"] for row in documents.rows), block_size):
        if len(block) == block_size or not collector.rows:
            collector.add({"input_ids": block}, len(block), len(block), False)
        else:
            collector.dropped[NOT_FULL] += 1
    return collector.result(documents.asked)
