"""Readers of conversations: lists of turns with or without roles, and tables with one message a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.data.formats.column_names import CONTENT, CONVERSATION_ID, ORDER, ROLE
from align.data.formats.pairs import pair_over, pair_with_last_answer
from align.data.formats.row_layout import Row, RowLayout
from align.data.formats.turns import (
    checked_text,
    kind_of,
    read_turns,
    read_turns_without_roles,
    split_turns,
    with_system,
)
from align.data.row_errors import RawRow, RowError
from align.errors import DataError, shorten
from align.schema import Record, user

Columns = Mapping[str, str | list[str]]
_MESSAGE_KEYS = ("tool_calls", "name", "tool_call_id")


def read_messages(row: Row, layout: RowLayout) -> list[Record]:
    """Read a conversation with roles: a demonstration, a labelled one, or the prompt of a pair."""
    column, value = layout.need(row, "messages")
    turns = read_turns(value, column, layout.tags)
    columns = layout.roles(row).columns
    if "system" in columns:
        turns = with_system(turns, layout.optional_text(row, "system"))
    if "chosen" in columns:
        return pair_over(row, layout, turns)
    if rejected := columns.get("rejected"):
        return pair_with_last_answer(turns, column, layout.answer(row, "rejected"), rejected)
    prompt, completion = split_turns(turns, column, as_prompt=layout.view == "prompt")
    if completion is None and layout.view not in (None, "prompt"):
        raise RowError("no assistant turn", column, "has no assistant turn", "add an answer or remove the row")
    return [Record(prompt=prompt, completion=completion, label=layout.label(row) if completion else None)]


def read_conversation_without_roles(row: Row, layout: RowLayout) -> list[Record]:
    """Read turns that user and assistant take in turn; a last user turn without an answer is left out."""
    column, value = layout.need(row, "messages")
    turns = read_turns_without_roles(value, column)
    if len(turns) == 1 and layout.view in (None, "prompt"):
        return [Record(prompt=with_system(turns, layout.optional_text(row, "system")))]
    if len(turns) < 2:
        raise RowError("no assistant turn", column, f"has {len(turns)} turns", "a conversation needs two")
    if len(turns) % 2 and layout.view != "prompt":
        layout.decisions["conversations without roles end with a line that nobody answers; it was left out"] += 1
        turns = turns[:-1]
    prompt, completion = split_turns(with_system(turns, layout.optional_text(row, "system")), column, as_prompt=True)
    return [Record(prompt=prompt, completion=completion)]


def read_user_turns(row: Row, layout: RowLayout) -> list[Record]:
    """Read the user turns of a conversation (MT-bench): the first is the prompt, `meta.follow_ups` are the others."""
    column, value = layout.need(row, "messages")
    if not isinstance(value, list) or not value:
        raise RowError("no questions", column, f"is {kind_of(value)}, not a list of texts", "write [question, ...]")
    first, *others = (checked_text(text, f"{column}[{index}]", "empty prompt") for index, text in enumerate(value))
    return [Record(prompt=[user(first)], meta={"follow_ups": others} if others else {})]


def find_message_columns(row: Row, named: Columns | None = None) -> dict[str, str] | None:
    """Return the columns of conversation, role, content and order; None for a row that is no single message."""
    named = named or {}
    columns: dict[str, str] = {}
    for part, names in (("conversation", CONVERSATION_ID), ("role", ROLE), ("content", CONTENT), ("order", ORDER)):
        given = named.get(part)
        column = given if isinstance(given, str) else next((name for name in names if _is_cell(row.get(name))), None)
        if column is not None:
            columns[part] = column
    is_tree = "parent_id" in row  # messages with several answers to each are no one conversation
    return columns if {"conversation", "role", "content"} <= columns.keys() and not is_tree else None


def _is_cell(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and value != ""


def join_messages(rows: Iterator[RawRow], name: str, named: Columns) -> Iterator[RawRow]:
    """Yield one row for each run of rows with the same conversation id.

    Raises DataError where an id comes back after another: rows are held for one conversation at a time.
    """
    seen: set[int] = set()
    messages: list[RawRow] = []
    current: Any = None
    columns: dict[str, str] | None = None
    for raw in rows:
        columns = columns or (find_message_columns(raw.value, named) if isinstance(raw.value, dict) else None)
        if columns is None or not isinstance(raw.value, dict) or columns["conversation"] not in raw.value:
            yield raw if isinstance(raw.value, RowError) else raw._replace(value=_not_a_message(columns))
            continue
        key = raw.value[columns["conversation"]]
        if messages and key != current:
            yield _join(messages, columns)
            messages = []
        if not messages:
            if hash(str(key)) in seen:
                raise DataError(
                    f"{name}:{raw.line} {columns['conversation']}: {shorten(key)} comes back after another one; "
                    "sort the rows by conversation and turn"
                )
            seen.add(hash(str(key)))
            current = key
        messages.append(raw)
    if messages and columns:
        yield _join(messages, columns)


def _not_a_message(columns: dict[str, str] | None) -> RowError:
    wanted = ", ".join((columns or {}).values()) or "conversation_id, role, content"
    return RowError("not a message", "row", f"is no message with {wanted}", "fill it in or remove the row")


def _join(messages: list[RawRow], columns: dict[str, str]) -> RawRow:
    """Return one row of the messages of a conversation, sorted by the order column where every cell is a number."""
    order = columns.get("order")
    positions = [_position(raw.value.get(order)) for raw in messages] if order else []
    if positions and None not in positions and len(set(positions)) == len(positions):
        messages = [raw for _, raw in sorted(zip(positions, messages, strict=True), key=lambda pair: pair[0] or 0)]
    turns = [
        {"role": raw.value.get(columns["role"]), "content": raw.value.get(columns["content"])}
        | {key: raw.value[key] for key in _MESSAGE_KEYS if raw.value.get(key)}
        for raw in messages
    ]
    first = messages[0].value
    used = {*columns.values(), *_MESSAGE_KEYS, "id", "message_id"}
    shared = {
        key: value
        for key, value in first.items()
        if key not in used and all(raw.value.get(key) == value for raw in messages)
    }
    return messages[0]._replace(value={**shared, "messages": turns, "id": first[columns["conversation"]]})


def _position(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
