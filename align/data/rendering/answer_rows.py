"""Prompts and answers as tokens apart: pairs of a chosen and a rejected answer, or one answer with a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.rendering.chat_template import ChatTemplate, RowDropped, TemplateRefusal, require_template
from align.data.rendering.fit_length import LengthLimit, droppable_turns, encode_rendered, find_first_fit, truncate_left
from align.data.rendering.omissions import REASONING_REASONS, check_context, decode_text, find_lost_in_turn
from align.data.rendering.rendered_rows import HISTORY, TOO_LONG, UNPROMPTED, RenderedRows
from align.data.rendering.turn_spans import locate_turns
from align.schema import Messages, Record

Row = dict[str, Any]
NotedRow = tuple[Row, list[str]]
"""a row, and what is to be said of it"""


def preference_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, each answer up to and with its stop token.

    `margin` is there too if every record has one.
    """
    return _answer_rows(records, ("chosen", "rejected"), tokenizer, limit)


def unpaired_rows(records: Sequence[Record], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    """Return rows of `prompt_ids`, `completion_ids` up to and with its stop token, and `label`."""
    return _answer_rows(records, ("completion",), tokenizer, limit)


def _answer_rows(records: Sequence[Record], sides: tuple[str, ...], tokenizer: Any, limit: LengthLimit) -> RenderedRows:
    rows = RenderedRows(asked=len(records))
    template = require_template(tokenizer, stop=True)
    with_margin = all(record.margin is not None for record in records)
    for record in records:
        with rows.counting_drops():
            row, shortened, notices = _fit_record(template, record, sides, limit)
            _require_whole(record, row, sides, tokenizer, limit)
            rows.stopped += 1
            answers = [row[f"{side}_ids"] for side in sides]
            if len(sides) == 1:
                row["label"] = bool(record.label)
            elif answers[0] == answers[1]:
                raise RowDropped("chosen and rejected are the same tokens")
            elif with_margin:
                row["margin"] = record.margin
            trained = sum(map(len, answers))
            rows.add(row, len(sides) * len(row["prompt_ids"]) + trained, trained, shortened, notices)
    return rows.ordered()


def _require_whole(record: Record, row: Row, sides: tuple[str, ...], tokenizer: Any, limit: LengthLimit) -> None:
    """Raise RowDropped with the reason why an answer is not whole in its trained tokens."""
    for side in sides:
        written = decode_text(row[f"{side}_ids"], tokenizer)
        for turn in getattr(record, side) or []:
            lost = find_lost_in_turn(turn, written) if turn["role"] == "assistant" else None
            if lost is not None and not (limit.ignore_lost_reasoning and lost in REASONING_REASONS):
                raise RowDropped(lost)


def _fit_record(
    template: ChatTemplate, record: Record, sides: tuple[str, ...], limit: LengthLimit
) -> tuple[Row, bool, list[str]]:
    """Return the row of a record within the length, whether its prompt was shortened, and notices."""
    whole = _render_record(template, record, sides, record.prompt)
    if _length(whole[0]) <= limit.max_length:
        return whole[0], False, whole[1]
    head, starts = droppable_turns(record.prompt)

    def start_at(first: int) -> NotedRow:
        return _render_record(template, record, sides, [*record.prompt[:head], *record.prompt[first:]])

    row, notices = find_first_fit(starts, start_at, lambda short: _length(short[0]) <= limit.max_length) or whole
    if (over := _length(row) - limit.max_length) > 0:
        prompt, bos = row["prompt_ids"], template.tokenizer.bos_token_id
        cuts = limit.on_long == "truncate_left"
        row["prompt_ids"] = truncate_left(prompt, len(prompt), len(prompt) - over, bos) if cuts else None
        if not row["prompt_ids"]:
            raise RowDropped(TOO_LONG)
    return row, True, notices


def _length(row: Row) -> int:
    """Return the tokens of the prompt with the longest answer."""
    prompt, *answers = map(len, row.values())
    return prompt + max(answers)


def _render_record(template: ChatTemplate, record: Record, sides: tuple[str, ...], prompt: Messages) -> NotedRow:
    """Return the ids of a prompt and of each side of a record as an answer to it."""
    conversations = [[*prompt, *(getattr(record, side) or [])] for side in sides]
    rendered = [locate_turns(template, messages, record.tools) for messages in conversations]
    notices = set()
    for messages, text in zip(conversations, rendered, strict=True):
        answers = [number for number in range(len(prompt), len(messages)) if messages[number]["role"] == "assistant"]
        if check_context(template, messages, record.tools, text, answers):
            notices.add(HISTORY)
        if not all(span.prompted for span in text.spans if span.turn in answers):
            notices.add(UNPROMPTED)
    prompts, row = [], {}
    for side, text, pieces in zip(sides, rendered, encode_rendered(template.tokenizer, rendered), strict=True):
        start = text.edges().index(next(span.start for span in text.spans if span.turn == len(prompt)))
        prompt_ids, answer_ids = ([token for ids in part for token in ids] for part in (pieces[:start], pieces[start:]))
        last = max(position for position, token in enumerate(answer_ids) if token in template.stop_ids)
        prompts.append(prompt_ids)
        row[f"{side}_ids"] = answer_ids[: last + 1]
    if any(ids != prompts[0] for ids in prompts):
        raise TemplateRefusal("refused by the chat template: it writes the prompts of chosen and rejected differently")
    return {"prompt_ids": prompts[0]} | row, sorted(notices)
