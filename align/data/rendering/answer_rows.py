"""Prompts and answers as tokens apart: pairs of a chosen and a rejected answer, or one answer with a label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from align.data.rendering.chat_template import ChatTemplate, TemplateRefusal, require_template
from align.data.rendering.encode import encode_rendered, split_at_turns
from align.data.rendering.fit_length import TOO_LONG, LengthLimit, droppable_turns, find_first_fit, truncate_left
from align.data.rendering.omissions import REASONING_REASONS, check_context, decode_text, find_lost_in_turn
from align.data.rendering.rendered_rows import HISTORY, UNPROMPTED, RenderedRows, RowCollector
from align.data.rendering.turn_spans import RenderedText, locate_turns
from align.schema import Messages, Record

SAME_ANSWER = "chosen and rejected are the same tokens"

Row = dict[str, Any]


def preference_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, each answer up to and with its stop token.

    `margin` is there too if every record has one.
    """
    collector = RowCollector()
    with_margin = all(record.margin is not None for record in records)
    for record, fitted in _fit_records(records, ("chosen", "rejected"), tokenizer, limit, collector):
        row = fitted.row
        if row["chosen_ids"] == row["rejected_ids"]:
            collector.dropped[SAME_ANSWER] += 1
            continue
        answers = len(row["chosen_ids"]) + len(row["rejected_ids"])
        tokens = 2 * len(row["prompt_ids"]) + answers
        collector.add(row | ({"margin": record.margin} if with_margin else {}), tokens, answers, fitted.shortened)
        collector.count_notices(fitted.notices)
    return collector.result(len(records))


def unpaired_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return rows of `prompt_ids`, `completion_ids` up to and with its stop token, and `label`."""
    collector = RowCollector()
    for record, fitted in _fit_records(records, ("completion",), tokenizer, limit, collector):
        row = fitted.row | {"label": bool(record.label)}
        answer = len(row["completion_ids"])
        collector.add(row, len(row["prompt_ids"]) + answer, answer, fitted.shortened)
        collector.count_notices(fitted.notices)
    return collector.result(len(records))


class _FittedRow(NamedTuple):
    """The row of a record, whether its prompt was shortened, and the notices that hold of it."""

    row: Row
    shortened: bool
    notices: dict[str, bool]

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longest answer."""
        answers = (len(ids) for key, ids in self.row.items() if key != "prompt_ids")
        return len(self.row["prompt_ids"]) + max(answers)


def _fit_records(
    records: Sequence[Record], sides: tuple[str, ...], tokenizer: Any, limit: LengthLimit, collector: RowCollector
) -> Iterator[tuple[Record, _FittedRow]]:
    """Yield each record with its row; those that give none are counted in `collector`."""
    template = require_template(tokenizer, stop=True)
    for record in records:
        try:
            fitted = _fit_record(template, record, sides, limit)
        except TemplateRefusal as error:
            collector.dropped[str(error)] += 1
            continue
        lost = TOO_LONG if fitted is None else _find_lost(record, fitted.row, sides, tokenizer, limit)
        if fitted is None or lost is not None:
            collector.dropped[lost or TOO_LONG] += 1
            continue
        collector.stops += 1
        yield record, fitted


def _find_lost(record: Record, row: Row, sides: tuple[str, ...], tokenizer: Any, limit: LengthLimit) -> str | None:
    """Return the reason why an answer is not whole in its trained tokens."""
    for side in sides:
        written = decode_text(row[f"{side}_ids"], tokenizer)
        for turn in getattr(record, side) or []:
            lost = find_lost_in_turn(turn, written) if turn["role"] == "assistant" else None
            if lost is not None and not (limit.ignore_lost_reasoning and lost in REASONING_REASONS):
                return lost
    return None


def _fit_record(
    template: ChatTemplate, record: Record, sides: tuple[str, ...], limit: LengthLimit
) -> _FittedRow | None:
    """Return the row of a record within the length; None when it cannot be."""
    whole = _render_record(template, record, sides, record.prompt)
    if whole.length <= limit.max_length:
        return whole
    head, starts = droppable_turns(record.prompt)

    def start_at(first: int) -> _FittedRow:
        return _render_record(template, record, sides, [*record.prompt[:head], *record.prompt[first:]])

    short = find_first_fit(starts, start_at, lambda row: row.length <= limit.max_length) or whole
    short = short._replace(shortened=True)
    over = short.length - limit.max_length
    if over <= 0:
        return short
    if not limit.truncates_prompts:
        return None
    prompt = short.row["prompt_ids"]
    shortened = truncate_left(prompt, len(prompt), len(prompt) - over, template.tokenizer.bos_token_id)
    return short._replace(row=short.row | {"prompt_ids": shortened}) if shortened else None


def _render_record(template: ChatTemplate, record: Record, sides: tuple[str, ...], prompt: Messages) -> _FittedRow:
    """Return the ids of a prompt, and of each side of a record as an answer to it."""
    conversations = [[*prompt, *(getattr(record, side) or [])] for side in sides]
    rendered = [locate_turns(template, messages, record.tools) for messages in conversations]
    notices = dict.fromkeys((HISTORY, UNPROMPTED), False)
    for messages, text in zip(conversations, rendered, strict=True):
        answers = [number for number in range(len(prompt), len(messages)) if messages[number]["role"] == "assistant"]
        notices[HISTORY] |= check_context(template, messages, record.tools, text, answers)
        notices[UNPROMPTED] |= not all(span.prompted for span in text.spans if span.turn in answers)
    prompts, row = [], {}
    for side, text, pieces in zip(sides, rendered, encode_rendered(template.tokenizer, rendered), strict=True):
        start = next(span.start for span in text.spans if span.turn == len(prompt))
        prompt_ids, answer_ids = _divide(text, pieces, start)
        last = max(position for position, token in enumerate(answer_ids) if token in template.stop_ids)
        prompts.append(prompt_ids)
        row[f"{side}_ids"] = answer_ids[: last + 1]
    if any(ids != prompts[0] for ids in prompts):
        raise TemplateRefusal("refused by the chat template: it writes the prompts of chosen and rejected differently")
    return _FittedRow({"prompt_ids": prompts[0]} | row, shortened=False, notices=notices)


def _divide(rendered: RenderedText, pieces: list[list[int]], start: int) -> tuple[list[int], list[int]]:
    """Return the ids before and after a position in the text at which a turn starts."""
    before: list[int] = []
    after: list[int] = []
    position = 0
    for text, ids in zip(split_at_turns(rendered), pieces, strict=True):
        (before if position < start else after).extend(ids)
        position += len(text)
    return before, after
