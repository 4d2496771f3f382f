"""Demonstrations and prompts as rows of token ids.

Prompts are encoded apart from what follows, so a model is trained on exactly the prompt tokens it meets when it
generates (`render_chat`). Over-long rows lose their oldest turns, and are dropped and counted when that is not enough;
an answer or its stop token is never cut.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.data.rendering.chat_template import ChatTemplate, RowDropped, TemplateRefusal, require_template
from align.data.rendering.fit_length import Conversation, LengthLimit, encode_rendered, fit_conversations, truncate_left
from align.data.rendering.omissions import REASONING_REASONS, check_context, decode_text, find_lost_in_turn
from align.data.rendering.rendered_rows import HISTORY, TOO_LONG, UNPROMPTED, UNTRAINED, RenderedRows
from align.data.rendering.turn_spans import locate_continuation, locate_turns
from align.errors import DataError
from align.schema import Messages, Record

NOTHING_TRAINED = "no token to train"


def render_chat(
    messages: Messages,
    tokenizer: Any,
    tools: list[dict[str, Any]] | None = None,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    continue_final: bool = False,
) -> list[int]:
    """Return the ids of a conversation that waits for the assistant, as training saw them before the completion.

    `template_kwargs` are variables of the chat template, such as enable_thinking. With `continue_final` the last
    message is an assistant turn whose text is to be continued. Raises DataError for what the template does not take.
    """
    template = require_template(tokenizer)
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    for name in template_kwargs or {}:
        if name in reserved or not name.isidentifier():
            raise DataError(f"chat_template_kwargs: {name!r} cannot be set; the tokenizer or the request fills it in")
        if not re.search(rf"\b{name}\b", tokenizer.chat_template):
            raise DataError(f"chat_template_kwargs: the chat template reads no variable {name!r}; leave it out")
    if continue_final and (not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls")):
        raise DataError("a final message to continue: the last one is no assistant turn of text; give one, or none")
    try:
        if continue_final:
            rendered = locate_continuation(template, messages, tools, template_kwargs)
        else:
            rendered = locate_turns(template, messages, tools, generate=True, settings=template_kwargs)
        check_context(template, messages, tools, rendered)
    except TemplateRefusal as error:
        raise DataError(f"conversation of {len(messages)} messages: {error}; change its turns") from None
    return [token for ids in encode_rendered(tokenizer, [rendered])[0] for token in ids]


def prompt_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return prompts to generate from: rows of `prompt_ids` and `record`, the index of their record."""
    rows = RenderedRows(asked=len(records))
    prompts = (Conversation(index, record.prompt, record.tools, set()) for index, record in enumerate(records))
    for prompt in fit_conversations(require_template(tokenizer), prompts, limit, rows, generate=True):
        ids = prompt.ids
        if len(ids) > limit.max_length:
            ids = truncate_left(ids, len(ids), limit.max_length, tokenizer.bos_token_id) or []
        shortened, notices = prompt.shortened or len(ids) < prompt.length, [HISTORY] * prompt.loses_reasoning
        rows.add({"prompt_ids": ids, "record": prompt.index}, len(ids), 0, shortened, notices)
    return rows.ordered()


def demonstration_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return rows of `input_ids` and `completion_mask`, 1 on assistant tokens to learn with their stop token."""
    rows = RenderedRows(asked=len(records))
    template = require_template(tokenizer, stop=True)
    for conversation in fit_conversations(template, _demonstrations(records), limit, rows, generate=False):
        with rows.counting_drops():
            ids, shortened = conversation.ids, conversation.shortened
            mask, prompted, lost = _mask_whole_turns(template, conversation)
            if lost is not None and (lost not in REASONING_REASONS or not any(mask)):
                raise RowDropped(lost)
            if not any(mask):
                raise RowDropped(NOTHING_TRAINED)
            if len(ids) > limit.max_length:
                shortened = True
                ids = truncate_left(ids, mask.index(1), limit.max_length, tokenizer.bos_token_id) or []
                mask = mask[len(mask) - len(ids) :]
                if not ids:
                    raise RowDropped(TOO_LONG)
            notices = {HISTORY: conversation.loses_reasoning, UNTRAINED: lost is not None, UNPROMPTED: not prompted}
            said = [notice for notice, holds in notices.items() if holds]
            rows.add({"input_ids": ids, "completion_mask": mask}, len(ids), sum(mask), shortened, said)
            rows.stopped += not set(template.stop_ids).isdisjoint(itertools.compress(ids, mask))
    return rows.ordered()


def _demonstrations(records: Sequence[Record]) -> Iterator[Conversation]:
    """Yield prompt and completion of each record, the assistant turns of the completion to be learned."""
    for index, record in enumerate(records):
        messages = [*record.prompt, *(record.completion or [])]
        answers = range(len(record.prompt), len(messages))
        trained = {i for i in answers if messages[i]["role"] == "assistant" and messages[i].get("train", True)}
        yield Conversation(index, messages, record.tools, trained)


def _mask_whole_turns(template: ChatTemplate, conversation: Conversation) -> tuple[list[int], bool, str | None]:
    """Return the mask of the turns to learn, whether generation has the same prompts, and the gravest loss of a turn.

    A turn is learned up to and with its first stop token, and only where it is whole in its tokens. One without its
    reasoning is the context that generation has for a later one.
    """
    assert conversation.rendered is not None
    mask: list[int] = []
    prompted, worst = True, None
    spans = {span.start: span for span in conversation.rendered.spans if span.turn in conversation.trained}
    for position, piece in zip(conversation.rendered.edges(), conversation.pieces, strict=False):
        size = 0
        if span := spans.get(position):
            without_stop = 0 if span.end is None else len(piece)
            size = next((number for number, token in enumerate(piece, 1) if token in template.stop_ids), without_stop)
            learned = decode_text(piece[:size], template.tokenizer)
            lost = find_lost_in_turn(conversation.messages[span.turn], learned) if size else None
            if lost is None:
                prompted &= span.prompted
            else:
                size, worst = 0, lost if worst is None or worst in REASONING_REASONS else worst
        mask += [1] * size + [0] * (len(piece) - size)
    return mask, prompted, worst
