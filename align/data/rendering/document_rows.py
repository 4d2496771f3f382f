"""Documents for pretraining: plain text and whole conversations, each closed by EOS."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from align.data.rendering.chat_template import TemplateRefusal, require_template
from align.data.rendering.control_strings import control_pattern, split_controls
from align.data.rendering.conversation_rows import demonstration_conversations
from align.data.rendering.encode import encode_rendered, encode_texts
from align.data.rendering.fit_length import GROUP_SIZE, LengthLimit
from align.data.rendering.omissions import check_context
from align.data.rendering.rendered_rows import HISTORY, RenderedRows, RowCollector
from align.data.rendering.turn_spans import RenderedText, locate_turns
from align.schema import Record

NOT_FULL = "last block not full"


def document_rows(records: Sequence[Record], tokenizer: Any, _limit: LengthLimit) -> RenderedRows:
    """Return whole documents as rows of `input_ids`, EOS after each; a conversation is one too."""
    collector = RowCollector()
    for start in range(0, len(records), GROUP_SIZE):
        group = records[start : start + GROUP_SIZE]
        texts = iter(_text_documents([record for record in group if record.text is not None], tokenizer))
        chats = iter(_chat_documents([record for record in group if record.text is None], tokenizer, collector))
        for record in group:
            if ids := next(chats if record.text is None else texts):
                collector.add({"input_ids": ids}, len(ids), len(ids), False)
    return collector.result(len(records))


def pack_blocks(documents: Iterable[Sequence[int]], block_size: int) -> Iterator[list[int]]:
    """Yield documents joined and cut into blocks of `block_size` tokens; the last one may be shorter."""
    buffer: list[int] = []
    for ids in documents:
        buffer.extend(ids)
        full = len(buffer) - len(buffer) % block_size
        for start in range(0, full, block_size):
            yield buffer[start : start + block_size]
        del buffer[:full]
    if buffer:
        yield buffer


def _text_documents(records: Sequence[Record], tokenizer: Any) -> list[list[int]]:
    controls = control_pattern(tokenizer)
    safe = [split_controls(record.text or "", controls) for record in records]
    texts, separators = [text for text, _ in safe], [separator for _, separator in safe]
    encoded = encode_texts(tokenizer, texts, separators, [True] * len(safe))
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def _chat_documents(records: Sequence[Record], tokenizer: Any, collector: RowCollector) -> list[list[int]]:
    """Return conversations cut after their last stop token and closed by EOS; empty where the template refuses."""
    if not records:
        return []
    template = require_template(tokenizer, stop=True)
    rendered: dict[int, RenderedText] = {}
    for conversation in demonstration_conversations(records):
        messages, tools = conversation.messages, conversation.tools
        try:
            text = locate_turns(template, messages, tools)
            collector.count_notices({HISTORY: check_context(template, messages, tools, text)})
            rendered[conversation.index] = text
        except TemplateRefusal as error:
            collector.dropped[str(error)] += 1
    documents: list[list[int]] = [[] for _ in records]
    for index, pieces in zip(rendered, encode_rendered(tokenizer, list(rendered.values())), strict=True):
        ids = [token for piece in pieces for token in piece]
        last = max(position for position, token in enumerate(ids) if token in template.stop_ids)
        closed = ids[: last + 1]
        documents[index] = closed if closed[-1] == tokenizer.eos_token_id else [*closed, tokenizer.eos_token_id]
    return documents
