"""From raw rows to records: the format is chosen, every row is read by its format's reader and checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from align.data.dataset_config import SourceDataset
from align.data.formats import FORMATS, SAMPLE_ROWS, Format, detect_format, find_misspelt
from align.data.formats.cells import unpack_row
from align.data.formats.reshaping import PlainRow
from align.data.formats.row_layout import COMMON, ColumnRoles, Row, RowLayout, read_meta, read_number, read_tools
from align.data.formats.turns import kind_of, same_answers
from align.data.row_errors import SHOWN, BadRow, RawRow, RowError, RowSkipped
from align.data.views import natural_view, with_article
from align.schema import Record, View


def choose_format(
    config: SourceDataset, name: str, rows: Iterator[RawRow], notes: list[str]
) -> tuple[Iterator[RawRow], str]:
    """Return all rows again and their format, from the settings or else the first rows."""
    if config.format != "auto":
        return rows, config.format
    head = list(itertools.islice(rows, SAMPLE_ROWS))
    values = [raw.value for raw in head]
    named = [{"messages": value} if isinstance(value, list) else value for value in values]
    samples = [_unpack_if_sound(value) for value in named if isinstance(value, dict)]
    everything = itertools.chain(head, rows)
    if not samples:
        return everything, "text"
    format_name, reason = detect_format(samples, name, config.columns, config.source)
    notes.append(f"{name}: format {format_name}, decided by {reason}")
    return everything, format_name


def _unpack_if_sound(row: Row) -> Row:
    try:
        return unpack_row(row)
    except RowError:  # raised again, with its place, when the row is read
        return row


class RowReader:
    """A reader of one dataset's rows, all of one kind; refused and skipped rows are handed to the caller."""

    def __init__(
        self, row_format: Format, layout: RowLayout, on_bad: Callable[[BadRow], None], on_skip: Callable[[str], None]
    ) -> None:
        self._format, self._layout, self._on_bad, self._on_skip = row_format, layout, on_bad, on_skip
        self._kind: View | None = None
        self._unused: dict[str, None] = {}  # an ordered set

    def read(self, raw: RawRow) -> list[Record]:
        """Return the records of a row; one of several examples in it that is bad spoils no other."""
        records: list[Record] = []
        try:
            row = unpack_row(_row_of(raw, self._format), self._layout.decisions)
            for part in _split(row, self._format, self._layout):
                try:
                    records += self._read_part(part, raw)
                except RowSkipped as skip:
                    self._on_skip(skip.reason)
                except RowError as error:
                    self._refuse(raw, error)
        except RowError as error:  # the row as a whole
            self._refuse(raw, error)
            return []
        return records

    def _refuse(self, raw: RawRow, error: RowError) -> None:
        self._on_bad(BadRow(f"{raw.source}:{raw.line}", error, raw.value))

    def _read_part(self, part: PlainRow, raw: RawRow) -> list[Record]:
        records = _read_plain_row(part, self._format, self._layout)
        for record in records:
            record.source, record.line = raw.source, raw.line
            self._require_kind(record)
            if record.meta:
                self._unused.update(dict.fromkeys(record.meta))
        return records

    def _require_kind(self, record: Record) -> None:
        kind = natural_view(record)
        if self._kind is None:
            self._kind = kind
        if kind == self._kind:
            return
        if kind == "prompt" and self._kind == "demonstration":
            raise RowError("no assistant turn", "row", "has no assistant turn", "add an answer or remove the row")
        problem = f"is {with_article(kind)} row among {self._kind} rows"
        raise RowError("mixed rows", "row", problem, "keep one kind in a dataset")

    def notes(self) -> Iterator[str]:
        """Yield the decisions that were taken about the rows that were read."""
        if self._unused:
            listed = ", ".join(map(str, itertools.islice(self._unused, SHOWN)))
            listed += f" and {len(self._unused) - SHOWN} more" if len(self._unused) > SHOWN else ""
            yield f"columns kept as meta: {listed}{_misspelt_parts(self._unused, self._layout)}"
        yield from (f"{count} {decision}" for decision, count in self._layout.decisions.items())


def read_row(row: dict[str, Any], format_name: str, layout: RowLayout) -> list[Record]:
    """Return the records of one raw row, checked; RowError or RowSkipped, be it for one of several examples in it."""
    row_format = FORMATS[format_name]
    return [
        record
        for part in _split(unpack_row(row), row_format, layout)
        for record in _read_plain_row(part, row_format, layout)
    ]


def _row_of(raw: RawRow, row_format: Format) -> Row:
    """Return the row as columns: a bare string is a text, and a bare list the turns of a conversation."""
    row = raw.value
    if isinstance(row, dict):
        return row
    if isinstance(row, RowError):
        raise row
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, list) and "messages" in row_format.columns:
        return {"messages": row}
    raise RowError("not a row", "row", f"is {kind_of(row)}, not an object", "write {column: value}")


def _split(row: Row, row_format: Format, layout: RowLayout) -> Iterable[PlainRow]:
    return (row,) if row_format.split is None else row_format.split(row, layout)


def _read_plain_row(row: PlainRow, row_format: Format, layout: RowLayout) -> list[Record]:
    if isinstance(row, RowSkipped):
        raise row
    records = row_format.read(row, layout)
    roles = layout.roles(row)
    for record in records:
        if roles.extras:
            _add_extras(record, row, roles)
        if roles.unused:
            record.meta = record.meta | {key: row[key] for key in roles.unused}
        _check_record(record)
    return records


def _add_extras(record: Record, row: Row, roles: ColumnRoles) -> None:
    for part, column in roles.extras:
        value = row[column]
        if part == "id":
            record.id = None if value is None or value == "" else str(value)
        elif part == "tools":
            record.tools = read_tools(value, column)
        elif part == "meta":
            record.meta = read_meta(value, column)
        elif (number := read_number(value, column)) is not None:
            setattr(record, part, number)


def _check_record(record: Record) -> None:
    """Raise RowError for what no format may produce: a prompt without a question, equal or unmaskable answers."""
    if record.text is not None:
        return
    prompt = record.prompt
    if not (prompt and prompt[-1]["role"] == "user") and not any(turn["role"] == "user" for turn in prompt):
        raise RowError("empty prompt", "prompt", "has no user turn", "add the question or remove the row")
    if record.chosen is None or record.rejected is None:
        return
    for part, turns in (("chosen", record.chosen), ("rejected", record.rejected)):
        others = {turn["role"] for turn in turns} - {"assistant"}
        if others or not turns:
            problem = f"goes on with a {', '.join(sorted(others))} turn"
            raise RowError("answers part early", part, problem, "chosen and rejected may differ in one answer only")
    if same_answers(record.chosen, record.rejected):
        raise RowError("chosen equals rejected", "chosen", "equals rejected", "nothing can be learned; remove the row")


def _misspelt_parts(unused: Iterable[str], layout: RowLayout) -> str:
    """Return a hint for every unused column whose name is nearly that of an optional part."""
    names = {name for part, spellings in layout.synonyms.items() if part not in COMMON for name in spellings}
    hints = [(column, near) for column in unused if (near := find_misspelt(str(column), names))]
    return "".join(f"; did you mean {near} by {column}?" for column, near in hints)
