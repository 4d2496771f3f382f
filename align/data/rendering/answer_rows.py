"""Prompts and answers as tokens apart: pairs of a chosen and a rejected answer, or one answer with a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from align.data.rendering.chat_template import ChatTemplate, RowDropped, TemplateRefusal, require_template
from align.data.rendering.encode import encode_rendered
from align.data.rendering.fit_length import LengthLimit, droppable_turns, find_first_fit, truncate_left
from align.data.rendering.omissions import REASONING_REASONS, check_context, decode_text, find_lost_in_turn
from align.data.rendering.rendered_rows import HISTORY, TOO_LONG, UNPROMPTED, RenderedRows
from align.data.rendering.turn_spans import locate_turns
from align.schema import Messages, Record

Row = dict[str, Any]


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
            fitted = _fit_record(template, record, sides, limit)
            _require_whole(record, fitted.row, sides, tokenizer, limit)
            rows.stopped += 1
            answers = [fitted.row[f"{side}_ids"] for side in sides]
            extra: Row
            if len(sides) == 1:
                extra = {"label": bool(record.label)}
            elif answers[0] == answers[1]:
                raise RowDropped("chosen and rejected are the same tokens")
            else:
                extra = {"margin": record.margin} if with_margin else {}
            trained = sum(map(len, answers))
            tokens = len(sides) * len(fitted.row["prompt_ids"]) + trained
            rows.add(fitted.row | extra, tokens, trained, shortened=fitted.shortened, notices=fitted.notices)
    return rows.ordered()


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


def _require_whole(record: Record, row: Row, sides: tuple[str, ...], tokenizer: Any, limit: LengthLimit) -> None:
    """Raise RowDropped with the reason why an answer is not whole in its trained tokens."""
    for side in sides:
        written = decode_text(row[f"{side}_ids"], tokenizer)
        for turn in getattr(record, side) or []:
            lost = find_lost_in_turn(turn, written) if turn["role"] == "assistant" else None
            if lost is not None and not (limit.ignore_lost_reasoning and lost in REASONING_REASONS):
                raise RowDropped(lost)


def _fit_record(template: ChatTemplate, record: Record, sides: tuple[str, ...], limit: LengthLimit) -> _FittedRow:
    """Return the row of a record within the length; RowDropped when it cannot be."""
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
    prompt = short.row["prompt_ids"]
    bos, size = template.tokenizer.bos_token_id, len(prompt)
    cut = truncate_left(prompt, size, size - over, bos) if limit.on_long == "truncate_left" else None
    if not cut:
        raise RowDropped(TOO_LONG)
    return short._replace(row=short.row | {"prompt_ids": cut})


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
        start = text.edges().index(next(span.start for span in text.spans if span.turn == len(prompt)))
        prompt_ids, answer_ids = ([token for ids in part for token in ids] for part in (pieces[:start], pieces[start:]))
        last = max(position for position, token in enumerate(answer_ids) if token in template.stop_ids)
        prompts.append(prompt_ids)
        row[f"{side}_ids"] = answer_ids[: last + 1]
    if any(ids != prompts[0] for ids in prompts):
        raise TemplateRefusal("refused by the chat template: it writes the prompts of chosen and rejected differently")
    return _FittedRow({"prompt_ids": prompts[0]} | row, shortened=False, notices=notices)
