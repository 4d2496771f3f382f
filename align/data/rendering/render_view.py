"""Records of a view as rows of token ids, the way a stage trains them, and documents for pretraining."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from align.config import OnLong
from align.data.rendering.answer_rows import preference_rows, unpaired_rows
from align.data.rendering.chat_template import control_pattern, require_template, split_controls
from align.data.rendering.conversation_rows import demonstration_rows, prompt_rows
from align.data.rendering.fit_length import GROUP_SIZE, LengthLimit, encode_rendered
from align.data.rendering.omissions import check_context
from align.data.rendering.rendered_rows import HISTORY, RenderedRows
from align.data.rendering.turn_spans import RenderedText, locate_turns
from align.schema import Record, View

NOT_FULL = "last block not full"


def document_rows(records: Sequence[Record], tokenizer: Any, _limit: LengthLimit) -> RenderedRows:
    """Return whole documents as rows of `input_ids`, EOS after each; a conversation is one too."""
    rows = RenderedRows(asked=len(records))
    controls = control_pattern(tokenizer)
    for start in range(0, len(records), GROUP_SIZE):
        documents: list[RenderedText] = []
        chats: list[bool] = []
        for record in records[start : start + GROUP_SIZE]:
            with rows.counting_drops():
                if record.text is None:
                    template = require_template(tokenizer, stop=True)
                    messages = [*record.prompt, *(record.completion or [])]
                    document = locate_turns(template, messages, record.tools)
                    if check_context(template, messages, record.tools, document):
                        rows.noted[HISTORY] += 1
                else:
                    text, separator = split_controls(record.text, controls)
                    document = RenderedText(text, [], separator)
                documents.append(document)
                chats.append(record.text is None)
        for is_chat, pieces in zip(chats, encode_rendered(tokenizer, documents), strict=True):
            ids = [token for piece in pieces for token in piece]
            if is_chat:  # cut after the last stop token
                stops = require_template(tokenizer).stop_ids
                del ids[max(position for position, token in enumerate(ids) if token in stops) + 1 :]
            if not is_chat or ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            rows.add({"input_ids": ids}, len(ids), len(ids))
    return rows.ordered()


def pack_blocks(documents: Iterable[Sequence[int]], block_size: int) -> Iterator[list[int]]:
    """Yield documents joined and cut into blocks of `block_size` tokens; a shorter last one only if it is the first."""
    buffer: list[int] = []
    is_first = True
    for ids in documents:
        buffer.extend(ids)
        full = len(buffer) - len(buffer) % block_size
        for start in range(0, full, block_size):
            yield buffer[start : start + block_size]
            is_first = False
        del buffer[:full]
    if buffer and is_first:
        yield buffer


RENDERERS: dict[View, Callable[[Sequence[Record], Any, LengthLimit], RenderedRows]] = {
    "demonstration": demonstration_rows,
    "preference": preference_rows,
    "unpaired": unpaired_rows,
    "prompt": prompt_rows,
    "text": document_rows,
}
"""(records, tokenizer, limit) to rows; none need be left, so that parts of a dataset can be rendered apart."""


def render_view(
    view: View, records: Sequence[Record], tokenizer: Any, max_length: int, on_long: OnLong = "drop"
) -> RenderedRows:
    """Return the rows of records; `max_length` is the length of a block for the view `text`.

    Raises DataError when no row is left, or demonstrations never train a stop token.
    """
    rendered = RENDERERS[view](records, tokenizer, LengthLimit(max_length, on_long))
    if view == "text":
        documents, rendered = rendered, RenderedRows(asked=rendered.asked, dropped=Counter(rendered.dropped))
        for block in pack_blocks((row["input_ids"] for row in documents.rows), max_length):
            rendered.add({"input_ids": block}, len(block), len(block))
        if rendered.tokens < documents.tokens:
            rendered.dropped[NOT_FULL] += 1
        rendered.ordered()
    rendered.require_rows(len(rendered.rows), stops=view == "demonstration")
    return rendered
