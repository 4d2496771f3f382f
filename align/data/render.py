"""Records to tokens with exact completion masks, from the tokenizer's own chat template.

Prompts are encoded apart from what follows, so a model is trained on exactly the prompt tokens it meets when it
generates (`render_chat`). Control-token strings inside the data are encoded as plain text. Over-long rows lose their
oldest turns, and are dropped and counted when that is not enough; an answer or its stop token is never cut.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align.config import OnLong
from align.data.encode import cut, encode_all
from align.data.fitting import GROUP, TOO_LONG, Fit, Talk, cut_left, encode_renderings, fitted
from align.data.omissions import THOUGHTS, check_context, decoded, lost_in_turn
from align.data.rendered import HISTORY, UNPROMPTED, UNTRAINED, Rendered, Tally, require_stop, template_of
from align.data.templates import ChatFormat, Rendering, TemplateRefusal, chat_format, control_pattern, disarm
from align.errors import DataError
from align.schema import Messages, Record

NOTHING_TRAINED = "no token to train"
NOT_FULL = "last block not full"


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: EOS, then the end-of-turn token the chat template puts after an assistant turn."""
    return list(chat_format(tokenizer).stop_ids)


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
    style = template_of(tokenizer)
    _check_template_kwargs(template_kwargs or {}, tokenizer)
    if continue_final and (not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls")):
        raise DataError("a final message to continue: the last one is no assistant turn of text; give one, or none")
    try:
        if continue_final:
            rendering = style.locate_open(messages, tools, template_kwargs)
        else:
            rendering = style.locate(messages, tools, generate=True, settings=template_kwargs)
        check_context(style, messages, tools, rendering)
    except TemplateRefusal as error:
        raise DataError(f"conversation of {len(messages)} messages: {error}; change its turns") from None
    return [token for ids in encode_renderings(style, [rendering])[0] for token in ids]


def _check_template_kwargs(asked: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise DataError for a variable that is not the caller's to set, and for one the template never reads."""
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    for name in asked:
        if name in reserved or not name.isidentifier():
            raise DataError(f"chat_template_kwargs: {name!r} cannot be set; the tokenizer or the request fills it in")
        if not re.search(rf"\b{name}\b", tokenizer.chat_template):
            raise DataError(f"chat_template_kwargs: the chat template reads no variable {name!r}; leave it out")


def render_prompts(records: Sequence[Record], tokenizer: Any, max_length: int, on_long: OnLong = "drop") -> Rendered:
    """Prompts to generate from: rows of `prompt_ids` and `record`, the index of the record they come from."""
    return prompt_rows(records, tokenizer, Fit(max_length, on_long)).usable()


def prompt_rows(records: Sequence[Record], tokenizer: Any, fit: Fit) -> Rendered:
    """Rows of `render_prompts`, of which none may be left."""
    tally = Tally()
    talks = (Talk(index, record.prompt, record.tools, set()) for index, record in enumerate(records))
    for talk in fitted(template_of(tokenizer), talks, fit, tally.dropped, generate=True):
        ids = talk.ids
        if len(ids) > fit.max_length:
            ids = cut_left(ids, len(ids), fit.max_length, tokenizer.bos_token_id) or []
        tally.add({"prompt_ids": ids, "record": talk.index}, len(ids), 0, talk.shortened or len(ids) < talk.length)
        tally.note({HISTORY: talk.thoughtless})
    return tally.result(len(records))


def render_demonstrations(
    records: Sequence[Record], tokenizer: Any, max_length: int, on_long: OnLong = "drop"
) -> Rendered:
    """Demonstrations: rows of `input_ids` and `completion_mask`, 1 on assistant tokens to learn with their stop token.

    Raises DataError when nothing would be trained, or never a stop token.
    """
    return demonstration_rows(records, tokenizer, Fit(max_length, on_long)).usable(stops=True)


def demonstration_rows(records: Sequence[Record], tokenizer: Any, fit: Fit) -> Rendered:
    """Rows of `render_demonstrations`, of which none may be left and none train a stop token."""
    tally = Tally()
    style = template_of(tokenizer)
    require_stop(style)
    stops = set(style.stop_ids)
    for talk in fitted(style, _demonstrations(records), fit, tally.dropped):
        ids, turns = _trained_turns(style, talk)
        whole, lost = _whole_turns(ids, turns, talk.messages, tokenizer)
        mask = [0] * len(ids)
        for turn in whole:
            mask[turn.start : turn.start + turn.size] = [1] * turn.size
        if lost is not None and (lost not in THOUGHTS or not any(mask)):
            tally.dropped[lost] += 1
            continue
        if not any(mask):
            tally.dropped[NOTHING_TRAINED] += 1
            continue
        kept: list[int] | None = ids
        if len(ids) > fit.max_length:
            kept = cut_left(ids, mask.index(1), fit.max_length, tokenizer.bos_token_id)
        if kept is None:
            tally.dropped[TOO_LONG] += 1
            continue
        mask = mask[len(mask) - len(kept) :]
        tally.add({"input_ids": kept, "completion_mask": mask}, len(kept), sum(mask), talk.shortened or kept is not ids)
        tally.stops += not stops.isdisjoint(itertools.compress(kept, mask))
        prompted = all(turn.prompted for turn in whole)
        tally.note({HISTORY: talk.thoughtless, UNTRAINED: lost is not None, UNPROMPTED: not prompted})
    return tally.result(len(records))


def render_texts(records: Sequence[Record], tokenizer: Any, block_size: int) -> Rendered:
    """Documents packed into blocks of `block_size` tokens: rows of `input_ids`, EOS after every document.

    A conversation is a document too, written by the chat template. The last block is dropped when it is not full,
    unless it is the only one.
    """
    documents = document_rows(records, tokenizer, Fit(block_size))
    tally = Tally()
    tally.dropped += Counter(documents.dropped)
    for block in pack_blocks((row["input_ids"] for row in documents.rows), block_size):
        if len(block) == block_size or not tally.rows:
            tally.add({"input_ids": block}, len(block), len(block), False)
        else:
            tally.dropped[NOT_FULL] += 1
    return tally.result(len(records)).usable()


def document_rows(records: Sequence[Record], tokenizer: Any, _fit: Fit) -> Rendered:
    """Whole documents as rows of `input_ids`, EOS after each."""
    tally = Tally()
    for start in range(0, len(records), GROUP):
        group = records[start : start + GROUP]
        texts = iter(_text_documents([record for record in group if record.text is not None], tokenizer))
        chats = iter(_chat_documents([record for record in group if record.text is None], tokenizer, tally))
        for record in group:
            if ids := next(chats if record.text is None else texts):
                tally.add({"input_ids": ids}, len(ids), len(ids), False)
    return tally.result(len(records))


def pack_blocks(documents: Iterable[Sequence[int]], block_size: int) -> Iterator[list[int]]:
    """Documents joined and cut into blocks of `block_size` tokens; the last one may be shorter."""
    buffer: list[int] = []
    for ids in documents:
        buffer.extend(ids)
        whole = len(buffer) - len(buffer) % block_size
        for start in range(0, whole, block_size):
            yield buffer[start : start + block_size]
        del buffer[:whole]
    if buffer:
        yield buffer


def _text_documents(records: Sequence[Record], tokenizer: Any) -> list[list[int]]:
    controls = control_pattern(tokenizer)
    safe = [disarm(record.text or "", controls) for record in records]
    texts, seams = [text for text, _ in safe], [seam for _, seam in safe]
    encoded = encode_all(tokenizer, texts, seams, [True] * len(safe))
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def _chat_documents(records: Sequence[Record], tokenizer: Any, tally: Tally) -> list[list[int]]:
    """Whole conversations, each cut after its last stop token and closed by EOS; empty where the template refuses."""
    if not records:
        return []
    style = template_of(tokenizer)
    require_stop(style)
    renderings: dict[int, Rendering] = {}
    for talk in _demonstrations(records):
        try:
            rendering = style.locate(talk.messages, talk.tools)
            tally.note({HISTORY: check_context(style, talk.messages, talk.tools, rendering)})
            renderings[talk.index] = rendering
        except TemplateRefusal as error:
            tally.dropped[str(error)] += 1
    documents: list[list[int]] = [[] for _ in records]
    for index, pieces in zip(renderings, encode_renderings(style, list(renderings.values())), strict=True):
        ids = [token for piece in pieces for token in piece]
        last = max(place for place, token in enumerate(ids) if token in style.stop_ids)
        closed = ids[: last + 1]
        documents[index] = closed if closed[-1] == tokenizer.eos_token_id else [*closed, tokenizer.eos_token_id]
    return documents


def _demonstrations(records: Sequence[Record]) -> Iterator[Talk]:
    for index, record in enumerate(records):
        messages = [*record.prompt, *(record.completion or [])]
        answers = range(len(record.prompt), len(messages))
        learn = {i for i in answers if messages[i]["role"] == "assistant" and messages[i].get("train", True)}
        yield Talk(index, messages, record.tools, learn)


class _Turn(NamedTuple):
    """The trained tokens of an assistant turn: a trained turn up to and with its first stop token."""

    number: int
    start: int
    size: int
    prompted: bool


def _trained_turns(style: ChatFormat, talk: Talk) -> tuple[list[int], list[_Turn]]:
    """All ids of a conversation, and where its turns to learn are in them."""
    assert talk.rendering is not None
    spans = {span.start: span for span in talk.rendering.spans}
    ids: list[int] = []
    turns: list[_Turn] = []
    place = 0
    for text, piece in zip(cut(talk.rendering), talk.pieces, strict=True):
        span = spans.get(place)
        if span is not None and span.turn in talk.trained:
            size = _answer_length(piece, style.stop_ids, otherwise=0 if span.end is None else len(piece))
            turns.append(_Turn(span.turn, len(ids), size, span.prompted))
        ids += piece
        place += len(text)
    return ids, turns


def _whole_turns(
    ids: list[int], turns: list[_Turn], messages: Messages, tokenizer: Any
) -> tuple[list[_Turn], str | None]:
    """Return the turns that are whole in what is to be learned, and the gravest reason why another one is not.

    A turn without its reasoning is what generation has as context of a later one, so it is not learned.
    """
    whole: list[_Turn] = []
    worst = None
    for turn in turns:
        learned = decoded(ids[turn.start : turn.start + turn.size], tokenizer)
        lost = lost_in_turn(messages[turn.number], learned) if turn.size else None
        if lost is None:
            whole.append(turn)
        elif worst is None or worst in THOUGHTS:
            worst = lost
    return whole, worst


def _answer_length(ids: list[int], stops: list[int], otherwise: int) -> int:
    """How many ids there are up to the first stop token, counting it."""
    return next((place + 1 for place, token in enumerate(ids) if token in stops), otherwise)
