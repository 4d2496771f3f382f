"""Records to tokens with exact completion masks, from the tokenizer's own chat template.

Prompts are encoded apart from what follows, so a model is trained on exactly the prompt tokens it meets when it
generates (`render_chat`). Control-token strings inside the data are encoded as plain text. Over-long rows lose their
oldest turns, and are dropped and counted when that is not enough; an answer or its stop token is never cut.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.encode import cut, encode_all
from align.data.templates import ChatFormat, Rendering, TemplateRefusal, chat_format, control_pattern, disarm
from align.errors import DataError
from align.schema import Messages, Record

TOO_LONG = "longer than max_length"
NOTHING_TRAINED = "no token to train"
_GROUP = 512


@dataclass(frozen=True)
class Rendered:
    """Rendered rows and what became of the others."""

    rows: list[dict[str, Any]]
    dropped: dict[str, int] = field(default_factory=dict)
    """rows left out, by reason"""
    tokens: int = 0
    trained_tokens: int = 0
    shortened: int = 0
    """rows kept without their oldest turns"""


@dataclass(slots=True)
class _Talk:
    """A conversation on its way to tokens: `trained` are the indices of the turns to learn."""

    index: int
    messages: Messages
    tools: Any
    trained: set[int]
    rendering: Rendering | None = None
    pieces: list[list[int]] = field(default_factory=list)
    shortened: bool = False

    @property
    def length(self) -> int:
        return sum(map(len, self.pieces))


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: EOS, then the end-of-turn token the chat template puts after an assistant turn."""
    return list(chat_format(tokenizer).stop_ids)


def render_chat(messages: Messages, tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The ids of a conversation that waits for the assistant: exactly what training saw before the completion."""
    style = _template_of(tokenizer)
    try:
        rendering = style.locate(messages, tools, generate=True)
    except TemplateRefusal as error:
        raise DataError(f"conversation of {len(messages)} messages: {error}; change its turns") from None
    return [token for ids in _encode_renderings(style, [rendering])[0] for token in ids]


def render_prompts(records: Sequence[Record], tokenizer: Any, max_length: int) -> Rendered:
    """Prompts to generate from: rows of `prompt_ids` and `record`, the index of the record they come from."""
    tally = _Tally()
    style = _template_of(tokenizer)
    talks = (_Talk(index, record.prompt, record.tools, set()) for index, record in enumerate(records))
    for talk in _fitted(style, talks, max_length, tally, generate=True):
        ids = [token for piece in talk.pieces for token in piece]
        tally.add({"prompt_ids": ids, "record": talk.index}, len(ids), 0, talk.shortened)
    return tally.result(len(records))


def render_demonstrations(records: Sequence[Record], tokenizer: Any, max_length: int) -> Rendered:
    """Demonstrations: rows of `input_ids` and `completion_mask`, 1 on assistant tokens to learn with their stop token.

    Raises DataError when nothing would be trained, or never a stop token.
    """
    tally = _Tally()
    style = _template_of(tokenizer)
    _require_stop(style)
    stops = set(style.stop_ids)
    for talk in _fitted(style, _demonstrations(records), max_length, tally):
        ids, mask = _masked(style, talk)
        if any(mask):
            tally.add({"input_ids": ids, "completion_mask": mask}, len(ids), sum(mask), talk.shortened)
            tally.stops += not stops.isdisjoint(itertools.compress(ids, mask))
        else:
            tally.dropped[NOTHING_TRAINED] += 1
    if tally.rows and not tally.stops:
        raise DataError(
            f"{len(tally.rows)} rendered rows: none trains a stop token, so the model would never end an answer; "
            "train the last assistant turn, or use a chat template that closes it"
        )
    return tally.result(len(records))


def render_preferences(records: Sequence[Record], tokenizer: Any, max_length: int) -> Rendered:
    """Pairs: rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, each answer up to and with its stop token.

    `margin` is there too if every record has one.
    """
    tally = _Tally()
    style = _template_of(tokenizer)
    _require_stop(style)
    with_margin = all(record.margin is not None for record in records)
    for record in records:
        try:
            row, shortened = _pair(style, record, max_length)
        except TemplateRefusal as error:
            tally.dropped[str(error)] += 1
            continue
        if row is None:
            tally.dropped[TOO_LONG] += 1
            continue
        answers = len(row["chosen_ids"]) + len(row["rejected_ids"])
        tokens = 2 * len(row["prompt_ids"]) + answers
        tally.add(row | ({"margin": record.margin} if with_margin else {}), tokens, answers, shortened)
    return tally.result(len(records))


def render_texts(records: Sequence[Record], tokenizer: Any, block_size: int) -> Rendered:
    """Documents packed into blocks of `block_size` tokens: rows of `input_ids`, EOS after every document.

    A conversation is a document too, written by the chat template. The last block is dropped when it is not full,
    unless it is the only one.
    """
    tally = _Tally()
    buffer: list[int] = []
    for start in range(0, len(records), _GROUP):
        group = records[start : start + _GROUP]
        texts = iter(_text_documents([record for record in group if record.text is not None], tokenizer))
        chats = iter(_chat_documents([record for record in group if record.text is None], tokenizer, tally))
        for record in group:
            buffer += next(chats if record.text is None else texts)
    for start in range(0, len(buffer), block_size):
        block = buffer[start : start + block_size]
        if len(block) == block_size or start == 0:
            tally.add({"input_ids": block}, len(block), len(block), False)
        else:
            tally.dropped["last block not full"] += 1
    return tally.result(len(records))


def _text_documents(records: Sequence[Record], tokenizer: Any) -> list[list[int]]:
    controls = control_pattern(tokenizer)
    safe = [disarm(record.text or "", controls) for record in records]
    texts, seams = [text for text, _ in safe], [seam for _, seam in safe]
    encoded = encode_all(tokenizer, texts, seams, [True] * len(safe))
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def _chat_documents(records: Sequence[Record], tokenizer: Any, tally: _Tally) -> list[list[int]]:
    """Whole conversations, each cut after its last stop token and closed by EOS; empty where the template refuses."""
    if not records:
        return []
    style = _template_of(tokenizer)
    _require_stop(style)
    renderings: dict[int, Rendering] = {}
    for talk in _demonstrations(records):
        try:
            renderings[talk.index] = style.locate(talk.messages, talk.tools)
        except TemplateRefusal as error:
            tally.dropped[str(error)] += 1
    documents: list[list[int]] = [[] for _ in records]
    for index, pieces in zip(renderings, _encode_renderings(style, list(renderings.values())), strict=True):
        ids = [token for piece in pieces for token in piece]
        last = max(place for place, token in enumerate(ids) if token in style.stop_ids)
        closed = ids[: last + 1]
        documents[index] = closed if closed[-1] == tokenizer.eos_token_id else [*closed, tokenizer.eos_token_id]
    return documents


class _Tally:
    """Rows kept and rows dropped while rendering."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.tokens = self.trained = self.shortened = self.stops = 0

    def add(self, row: dict[str, Any], tokens: int, trained: int, shortened: bool) -> None:
        self.rows.append(row)
        self.tokens += tokens
        self.trained += trained
        self.shortened += shortened

    def result(self, asked: int) -> Rendered:
        """The finished rows; DataError when none is left."""
        if not self.rows:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common()) or "no rows given"
            raise DataError(f"{asked} rows to render: 0 are left ({reasons}); raise max_length or give other data")
        return Rendered(self.rows, dict(self.dropped.most_common()), self.tokens, self.trained, self.shortened)


def _template_of(tokenizer: Any) -> ChatFormat:
    if tokenizer.chat_template is None:
        raise DataError("tokenizer: it has no chat template, which says how a conversation is written; set one")
    return chat_format(tokenizer)


def _require_stop(style: ChatFormat) -> None:
    if style.end_of_turn is None:
        raise DataError(
            "chat template: no control token follows an assistant turn, so a model could not learn to stop; "
            "use a template that ends assistant turns with the EOS token"
        )


def _demonstrations(records: Sequence[Record]) -> Iterator[_Talk]:
    for index, record in enumerate(records):
        messages = [*record.prompt, *(record.completion or [])]
        answers = range(len(record.prompt), len(messages))
        learn = {i for i in answers if messages[i]["role"] == "assistant" and messages[i].get("train", True)}
        yield _Talk(index, messages, record.tools, learn)


def _fitted(
    style: ChatFormat, talks: Iterator[_Talk], limit: int, tally: _Tally, *, generate: bool = False
) -> Iterator[_Talk]:
    """Encoded conversations of at most `limit` tokens, in order; the rest is counted in `tally`."""
    group: list[_Talk] = []
    for talk in talks:
        try:
            talk.rendering = style.locate(talk.messages, talk.tools, generate=generate)
        except TemplateRefusal as error:
            tally.dropped[str(error)] += 1
            continue
        group.append(talk)
        if len(group) == _GROUP:
            yield from _fit_group(style, group, limit, tally, generate)
            group = []
    yield from _fit_group(style, group, limit, tally, generate)


def _fit_group(style: ChatFormat, group: list[_Talk], limit: int, tally: _Tally, generate: bool) -> Iterator[_Talk]:
    encoded = _encode_renderings(style, [talk.rendering for talk in group if talk.rendering])
    for talk, pieces in zip(group, encoded, strict=True):
        talk.pieces = pieces
        fitted = talk if talk.length <= limit else _shorten(style, talk, limit, generate)
        if fitted is None:
            tally.dropped[TOO_LONG] += 1
        else:
            yield fitted


def _encode_renderings(style: ChatFormat, renderings: Sequence[Rendering]) -> list[list[list[int]]]:
    cuts = [cut(rendering) for rendering in renderings]
    texts = [piece for pieces in cuts for piece in pieces]
    seams = [rendering.seam for rendering, pieces in zip(renderings, cuts, strict=True) for _ in pieces]
    opens = [number == 0 for pieces in cuts for number, _ in enumerate(pieces)]
    encoded = iter(encode_all(style.tokenizer, texts, seams, opens))
    return [[next(encoded) for _ in pieces] for pieces in cuts]


def _masked(style: ChatFormat, talk: _Talk) -> tuple[list[int], list[int]]:
    """All ids of a conversation, and 1 for each that is learned: a trained turn up to its first stop token."""
    assert talk.rendering is not None
    turns = {span.start: span.turn for span in talk.rendering.spans}
    closed = {span.start for span in talk.rendering.spans if span.end is not None}
    ids: list[int] = []
    mask: list[int] = []
    place = 0
    for text, piece in zip(cut(talk.rendering), talk.pieces, strict=True):
        learned = 0
        if turns.get(place) in talk.trained:
            learned = _answer_length(piece, style.stop_ids, otherwise=len(piece) if place in closed else 0)
        ids += piece
        mask += [1] * learned + [0] * (len(piece) - learned)
        place += len(text)
    return ids, mask


def _answer_length(ids: list[int], stops: list[int], otherwise: int) -> int:
    """How many ids there are up to the first stop token, counting it."""
    return next((place + 1 for place, token in enumerate(ids) if token in stops), otherwise)


def _shorten(style: ChatFormat, talk: _Talk, limit: int, generate: bool) -> _Talk | None:
    """The conversation without as few of its oldest turns as will do, or None when its last exchange is too long."""

    def attempt(first: int) -> _Talk | None:
        dropped = first - head
        kept = {turn - dropped for turn in talk.trained if turn >= first}
        messages = [*talk.messages[:head], *talk.messages[first:]]
        shorter = _Talk(talk.index, messages, talk.tools, kept, shortened=True)
        try:
            shorter.rendering = style.locate(messages, talk.tools, generate=generate)
        except TemplateRefusal:
            return None
        shorter.pieces = _encode_renderings(style, [shorter.rendering])[0]
        return shorter if shorter.length <= limit else None

    head = next((i for i, turn in enumerate(talk.messages) if turn["role"] != "system"), len(talk.messages))
    starts = [i for i, turn in enumerate(talk.messages) if turn["role"] == "user" and i > head]
    return _first_success(starts, attempt)


def _first_success(starts: list[int], attempt: Callable[[int], Any]) -> Any:
    """What `attempt` returns for the earliest start that succeeds; whatever succeeds early succeeds later too."""
    best, low, high = None, 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        found = attempt(starts[middle])
        best, low, high = (found, low, middle) if found is not None else (best, middle + 1, high)
    return best


def _pair(style: ChatFormat, record: Record, limit: int) -> tuple[dict[str, Any] | None, bool]:
    """The row of one pair within `limit` tokens (None when it cannot be), and whether old turns were left out."""
    prompt = record.prompt
    row = _pair_row(style, record, prompt)
    if _pair_length(row) <= limit:
        return row, False
    head = next((i for i, turn in enumerate(prompt) if turn["role"] != "system"), len(prompt))

    def attempt(first: int) -> dict[str, Any] | None:
        shorter = _pair_row(style, record, [*prompt[:head], *prompt[first:]])
        return shorter if _pair_length(shorter) <= limit else None

    starts = [i for i, turn in enumerate(prompt) if turn["role"] == "user" and i > head]
    return _first_success(starts, attempt), True


def _pair_length(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _pair_row(style: ChatFormat, record: Record, prompt: Messages) -> dict[str, Any]:
    sides = [record.chosen or [], record.rejected or []]
    renderings = [style.locate([*prompt, *side], record.tools) for side in sides]
    encoded = _encode_renderings(style, renderings)
    starts = [next(span.start for span in found.spans if span.turn == len(prompt)) for found in renderings]
    contexts, answers = [], []
    for found, pieces, start in zip(renderings, encoded, starts, strict=True):
        context, answer = _divide(found, pieces, start)
        last = max(place for place, token in enumerate(answer) if token in style.stop_ids)
        contexts.append(context)
        answers.append(answer[: last + 1])
    if contexts[0] != contexts[1]:
        raise TemplateRefusal("refused by the chat template: it writes the prompts of chosen and rejected differently")
    return {"prompt_ids": contexts[0], "chosen_ids": answers[0], "rejected_ids": answers[1]}


def _divide(rendering: Rendering, pieces: list[list[int]], start: int) -> tuple[list[int], list[int]]:
    before: list[int] = []
    after: list[int] = []
    place = 0
    for text, ids in zip(cut(rendering), pieces, strict=True):
        (before if place < start else after).extend(ids)
        place += len(text)
    return before, after
