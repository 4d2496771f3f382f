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
from typing import Any, NamedTuple

from align.data.rendering.chat_template import ChatTemplate, TemplateRefusal, measured_template, require_template
from align.data.rendering.encode import encode_rendered, split_at_turns
from align.data.rendering.fit_length import TOO_LONG, Conversation, LengthLimit, fit_conversations, truncate_left
from align.data.rendering.omissions import REASONING_REASONS, check_context, decode_text, find_lost_in_turn
from align.data.rendering.rendered_rows import HISTORY, UNPROMPTED, UNTRAINED, RenderedRows, RowCollector
from align.data.rendering.turn_spans import locate_continuation, locate_turns
from align.errors import DataError
from align.schema import Messages, Record

NOTHING_TRAINED = "no token to train"


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: EOS, then the chat template's end-of-turn token."""
    return list(measured_template(tokenizer).stop_ids)


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
    _check_template_kwargs(template_kwargs or {}, tokenizer)
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


def _check_template_kwargs(variables: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise DataError for a variable that is not the caller's to set, and for one the template never reads."""
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    for name in variables:
        if name in reserved or not name.isidentifier():
            raise DataError(f"chat_template_kwargs: {name!r} cannot be set; the tokenizer or the request fills it in")
        if not re.search(rf"\b{name}\b", tokenizer.chat_template):
            raise DataError(f"chat_template_kwargs: the chat template reads no variable {name!r}; leave it out")


def prompt_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return prompts to generate from: rows of `prompt_ids` and `record`, the index of their record."""
    collector = RowCollector()
    prompts = (Conversation(index, record.prompt, record.tools, set()) for index, record in enumerate(records))
    template = require_template(tokenizer)
    for prompt in fit_conversations(template, prompts, limit, collector.dropped, generate=True):
        ids = prompt.ids
        if len(ids) > limit.max_length:
            ids = truncate_left(ids, len(ids), limit.max_length, tokenizer.bos_token_id) or []
        shortened = prompt.shortened or len(ids) < prompt.length
        collector.add({"prompt_ids": ids, "record": prompt.index}, len(ids), 0, shortened)
        collector.count_notices({HISTORY: prompt.loses_reasoning})
    return collector.result(len(records))


def demonstration_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return rows of `input_ids` and `completion_mask`, 1 on assistant tokens to learn with their stop token."""
    collector = RowCollector()
    template = require_template(tokenizer, stop=True)
    stops = set(template.stop_ids)
    conversations = demonstration_conversations(records)
    for conversation in fit_conversations(template, conversations, limit, collector.dropped):
        ids, turns = _trained_turns(template, conversation)
        whole, lost = _select_whole_turns(ids, turns, conversation.messages, tokenizer)
        mask = [0] * len(ids)
        for turn in whole:
            mask[turn.start : turn.start + turn.size] = [1] * turn.size
        if lost is not None and (lost not in REASONING_REASONS or not any(mask)):
            collector.dropped[lost] += 1
            continue
        if not any(mask):
            collector.dropped[NOTHING_TRAINED] += 1
            continue
        fitted: list[int] | None = ids
        if len(ids) > limit.max_length:
            fitted = truncate_left(ids, mask.index(1), limit.max_length, tokenizer.bos_token_id)
        if fitted is None:
            collector.dropped[TOO_LONG] += 1
            continue
        mask = mask[len(mask) - len(fitted) :]
        row = {"input_ids": fitted, "completion_mask": mask}
        collector.add(row, len(fitted), sum(mask), conversation.shortened or fitted is not ids)
        collector.stops += not stops.isdisjoint(itertools.compress(fitted, mask))
        unprompted = not all(turn.prompted for turn in whole)
        collector.count_notices(
            {HISTORY: conversation.loses_reasoning, UNTRAINED: lost is not None, UNPROMPTED: unprompted}
        )
    return collector.result(len(records))


def demonstration_conversations(records: Sequence[Record]) -> Iterator[Conversation]:
    """Yield prompt and completion of each record, the assistant turns of the completion to be learned."""
    for index, record in enumerate(records):
        messages = [*record.prompt, *(record.completion or [])]
        answers = range(len(record.prompt), len(messages))
        trained = {i for i in answers if messages[i]["role"] == "assistant" and messages[i].get("train", True)}
        yield Conversation(index, messages, record.tools, trained)


class _TrainedTurn(NamedTuple):
    """The tokens of an assistant turn to learn, up to and with its first stop token."""

    number: int
    start: int
    size: int
    prompted: bool


def _trained_turns(template: ChatTemplate, conversation: Conversation) -> tuple[list[int], list[_TrainedTurn]]:
    """Return all ids of a conversation, and where its turns to learn are in them."""
    assert conversation.rendered is not None
    spans = {span.start: span for span in conversation.rendered.spans}
    ids: list[int] = []
    turns: list[_TrainedTurn] = []
    position = 0
    for text, piece in zip(split_at_turns(conversation.rendered), conversation.pieces, strict=True):
        span = spans.get(position)
        if span is not None and span.turn in conversation.trained:
            stop = next((index for index, token in enumerate(piece) if token in template.stop_ids), None)
            without_stop = 0 if span.end is None else len(piece)
            turns.append(_TrainedTurn(span.turn, len(ids), without_stop if stop is None else stop + 1, span.prompted))
        ids += piece
        position += len(text)
    return ids, turns


def _select_whole_turns(
    ids: list[int], turns: list[_TrainedTurn], messages: Messages, tokenizer: Any
) -> tuple[list[_TrainedTurn], str | None]:
    """Return the turns that are whole in their tokens, and the gravest reason why another one is not.

    A turn without its reasoning is the context that generation has for a later one, so it is not learned.
    """
    whole: list[_TrainedTurn] = []
    worst = None
    for turn in turns:
        learned = decode_text(ids[turn.start : turn.start + turn.size], tokenizer)
        lost = find_lost_in_turn(messages[turn.number], learned) if turn.size else None
        if lost is None:
            whole.append(turn)
        elif worst is None or worst in REASONING_REASONS:
            worst = lost
    return whole, worst
