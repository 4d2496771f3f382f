"""Prompts and answers as tokens apart: pairs of a chosen and a rejected answer, or one answer with a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from align.config import OnLong
from align.data.encode import cut
from align.data.fitting import TOO_LONG, Fit, cut_left, droppable, encode_renderings, first_that_fits
from align.data.omissions import THOUGHTS, check_context, decoded, lost_in_turn
from align.data.rendered import HISTORY, UNPROMPTED, Rendered, Tally, require_stop, template_of
from align.data.templates import ChatFormat, Rendering, TemplateRefusal
from align.schema import Messages, Record

SAME_ANSWER = "chosen and rejected are the same tokens"

Row = dict[str, Any]


def render_preferences(
    records: Sequence[Record], tokenizer: Any, max_length: int, on_long: OnLong = "drop"
) -> Rendered:
    """Pairs: rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, each answer up to and with its stop token.

    `margin` is there too if every record has one.
    """
    return preference_rows(records, tokenizer, Fit(max_length, on_long)).usable()


def render_unpaired(records: Sequence[Record], tokenizer: Any, max_length: int, on_long: OnLong = "drop") -> Rendered:
    """Answers with a verdict: rows of `prompt_ids`, `completion_ids` up to and with its stop token, and `label`."""
    return unpaired_rows(records, tokenizer, Fit(max_length, on_long)).usable()


def preference_rows(records: Sequence[Record], tokenizer: Any, fit: Fit) -> Rendered:
    """Rows of `render_preferences`, of which none may be left."""
    tally = Tally()
    with_margin = all(record.margin is not None for record in records)
    for record, (row, shortened, noted) in _answered(records, ("chosen", "rejected"), tokenizer, fit, tally):
        if row["chosen_ids"] == row["rejected_ids"]:
            tally.dropped[SAME_ANSWER] += 1
            continue
        answers = len(row["chosen_ids"]) + len(row["rejected_ids"])
        tokens = 2 * len(row["prompt_ids"]) + answers
        tally.add(row | ({"margin": record.margin} if with_margin else {}), tokens, answers, shortened)
        tally.note(noted)
    return tally.result(len(records))


def unpaired_rows(records: Sequence[Record], tokenizer: Any, fit: Fit) -> Rendered:
    """Rows of `render_unpaired`, of which none may be left."""
    tally = Tally()
    for record, (row, shortened, noted) in _answered(records, ("completion",), tokenizer, fit, tally):
        answer = len(row["completion_ids"])
        tally.add(row | {"label": bool(record.label)}, len(row["prompt_ids"]) + answer, answer, shortened)
        tally.note(noted)
    return tally.result(len(records))


class _Fitted(NamedTuple):
    """The row of a record, whether its prompt was shortened, and what is to be told of it."""

    row: Row
    shortened: bool
    noted: dict[str, bool]


def _answered(
    records: Sequence[Record], sides: tuple[str, ...], tokenizer: Any, fit: Fit, tally: Tally
) -> Iterator[tuple[Record, _Fitted]]:
    """Each record with its row; those that give none are counted in `tally`."""
    style = template_of(tokenizer)
    require_stop(style)
    for record in records:
        try:
            found = _fit(style, record, sides, fit)
        except TemplateRefusal as error:
            tally.dropped[str(error)] += 1
            continue
        lost = TOO_LONG if found is None else _lost(record, found.row, sides, tokenizer, fit)
        if found is None or lost is not None:
            tally.dropped[lost or TOO_LONG] += 1
            continue
        tally.stops += 1
        yield record, found


def _lost(record: Record, row: Row, sides: tuple[str, ...], tokenizer: Any, fit: Fit) -> str | None:
    """Return the reason why an answer is not whole in its trained tokens."""
    for side in sides:
        turns = getattr(record, side) or []
        written = decoded(row[f"{side}_ids"], tokenizer)
        for turn in turns:
            lost = lost_in_turn(turn, written) if turn["role"] == "assistant" else None
            if lost is not None and not (fit.spare_thoughts and lost in THOUGHTS):
                return lost
    return None


def _fit(style: ChatFormat, record: Record, sides: tuple[str, ...], fit: Fit) -> _Fitted | None:
    """The row of a record within the length; None when it cannot be."""
    whole = _row(style, record, sides, record.prompt)
    if _length(whole) <= fit.max_length:
        return whole
    head, starts = droppable(record.prompt)

    def attempt(first: int) -> _Fitted:
        return _row(style, record, sides, [*record.prompt[:head], *record.prompt[first:]])

    short = first_that_fits(starts, attempt, lambda found: _length(found) <= fit.max_length) or whole
    short = short._replace(shortened=True)
    over = _length(short) - fit.max_length
    if over <= 0:
        return short
    prompt = short.row["prompt_ids"]
    kept = cut_left(prompt, len(prompt), len(prompt) - over, style.tokenizer.bos_token_id) if fit.cuts else None
    return short._replace(row=short.row | {"prompt_ids": kept}) if kept else None


def _length(found: _Fitted) -> int:
    row = found.row
    return len(row["prompt_ids"]) + max(len(ids) for key, ids in row.items() if key != "prompt_ids")


def _row(style: ChatFormat, record: Record, sides: tuple[str, ...], prompt: Messages) -> _Fitted:
    """The ids of a prompt, and of each side of a record as an answer to it."""
    renderings = [style.locate([*prompt, *(getattr(record, side) or [])], record.tools) for side in sides]
    noted = dict.fromkeys((HISTORY, UNPROMPTED), False)
    for side, found in zip(sides, renderings, strict=True):
        messages = [*prompt, *(getattr(record, side) or [])]
        answers = [number for number in range(len(prompt), len(messages)) if messages[number]["role"] == "assistant"]
        noted[HISTORY] |= check_context(style, messages, record.tools, found, answers)
        noted[UNPROMPTED] |= not all(span.prompted for span in found.spans if span.turn in answers)
    encoded = encode_renderings(style, renderings)
    contexts, row = [], {}
    for side, found, pieces in zip(sides, renderings, encoded, strict=True):
        start = next(span.start for span in found.spans if span.turn == len(prompt))
        context, answer = _divide(found, pieces, start)
        last = max(place for place, token in enumerate(answer) if token in style.stop_ids)
        contexts.append(context)
        row[f"{side}_ids"] = answer[: last + 1]
    if any(context != contexts[0] for context in contexts):
        raise TemplateRefusal("refused by the chat template: it writes the prompts of chosen and rejected differently")
    return _Fitted({"prompt_ids": contexts[0]} | row, shortened=False, noted=noted)


def _divide(rendering: Rendering, pieces: list[list[int]], start: int) -> tuple[list[int], list[int]]:
    before: list[int] = []
    after: list[int] = []
    place = 0
    for text, ids in zip(cut(rendering), pieces, strict=True):
        (before if place < start else after).extend(ids)
        place += len(text)
    return before, after
