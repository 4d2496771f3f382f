"""Tables with one message a row: the rows of one conversation, which follow each other, become one row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.data.containers.json_files import RawRow
from align.data.formats.message_columns import columns_of
from align.data.row_errors import RowError
from align.errors import DataError, shorten


def join_messages(rows: Iterator[RawRow], name: str, named: Mapping[str, str | list[str]]) -> Iterator[RawRow]:
    """Conversations of the rows with the same conversation id.

    Raises DataError where an id comes back after another: rows are held for one conversation at a time.
    """
    seen: set[int] = set()
    held: list[RawRow] = []
    current: Any = None
    columns: dict[str, str] | None = None
    for raw in rows:
        columns = columns or (columns_of(raw.value, named) if isinstance(raw.value, dict) else None)
        if columns is None or not isinstance(raw.value, dict) or columns["conversation"] not in raw.value:
            yield raw if isinstance(raw.value, RowError) else raw._replace(value=_no_message(columns))
            continue
        key = raw.value[columns["conversation"]]
        if held and key != current:
            yield _join(held, columns)
            held = []
        if not held:
            if hash(str(key)) in seen:
                raise DataError(
                    f"{name}:{raw.line} {columns['conversation']}: {shorten(key)} comes back after another one; "
                    "sort the rows by conversation and turn"
                )
            seen.add(hash(str(key)))
            current = key
        held.append(raw)
    if held and columns:
        yield _join(held, columns)


def _no_message(columns: dict[str, str] | None) -> RowError:
    wanted = ", ".join((columns or {}).values()) or "conversation_id, role, content"
    return RowError("not a message", "row", f"is no message with {wanted}", "fill it in or remove the row")


def _join(held: list[RawRow], columns: dict[str, str]) -> RawRow:
    """One row of the messages of a conversation, in their order where a column tells it."""
    order = columns.get("order")
    places = [_place(raw.value.get(order)) for raw in held] if order else []
    if places and all(place is not None for place in places) and len(set(places)) == len(places):
        held = [raw for _, raw in sorted(zip(places, held, strict=True), key=lambda pair: pair[0] or 0)]
    turns = [{"role": raw.value.get(columns["role"]), "content": raw.value.get(columns["content"])} for raw in held]
    for turn, raw in zip(turns, held, strict=True):
        turn |= {key: raw.value[key] for key in ("tool_calls", "name", "tool_call_id") if raw.value.get(key)}
    first = held[0].value
    used = {*columns.values(), "tool_calls", "name", "tool_call_id", "id", "message_id"}
    same = {
        key: value
        for key, value in first.items()
        if key not in used and all(raw.value.get(key) == value for raw in held)
    }
    return held[0]._replace(value={**same, "messages": turns, "id": first[columns["conversation"]]})


def _place(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
