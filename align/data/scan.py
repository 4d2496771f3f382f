"""Scanning: one pass over a dataset of any size, in batches of checked records, and an account of what was left out."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from align.data import containers
from align.data.catalog import Dataset, DatasetConfig, find, make_layout
from align.data.containers import RawRow, ReadOptions
from align.data.digest import Digest
from align.data.formats import FORMATS, Format, check_record
from align.data.formats.cells import unpack_row
from align.data.formats.detection import LOOKED_AT, slip_of, sniff
from align.data.formats.message_rows import join_messages
from align.data.formats.nested_rows import PlainRow
from align.data.formats.row_layout import COMMON, ColumnRoles, Row, RowLayout, read_meta, read_number, read_tools
from align.data.formats.turns import kind_of
from align.data.row_errors import SHOWN, BadRow, RowError, RowSkipped, kind_of_error, tell
from align.data.split import is_held_out
from align.data.views import a_kind, convert, natural_view
from align.data.vote_filter import VoteFilterPass
from align.errors import DataError, UsageError, nearest
from align.schema import VIEWS, Record, View

BATCH = 1000
"""The most records a batch of a scan holds."""
LARGEST_BATCH = 4 << 20
"""Bytes of content after which a batch ends early, so that long records do not add up."""

OnBadRow = Literal["error", "skip", "collect"]


class Scan:
    """One reading of one dataset: iterate it once and get batches of records, at most `BATCH` of them each.

    While it runs and afterwards it carries the account: `rows` (raw rows read), `kept` (records given), `bad` (the
    first bad rows of every kind), `reasons` (how many rows each reason refused, all of them), `skipped` (rows left out
    by choice, by reason) and `notes` (what had to be decided). At the end it carries `digest` and `repeated` too.
    """

    def __init__(self, name: str, batches: Callable[[Scan], Iterator[list[Record]]]) -> None:
        self.name = name
        self.rows = 0
        self.kept = 0
        self.bad: list[BadRow] = []
        self.reasons: Counter[str] = Counter()
        self.equal: Counter[tuple[str, ...]] = Counter()
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.digest = ""
        self.repeated = 0
        self._batches = batches

    def __iter__(self) -> Iterator[list[Record]]:
        """The batches; DataError at the end when bad rows are errors or nothing was left."""
        return self._batches(self)

    def refuse(self, row: BadRow) -> None:
        """Count a bad row, and keep it unless an equal error, or many of its reason, were kept already."""
        self.reasons[row.error.reason] += 1
        kind = kind_of_error(row.error)
        if kind in self.equal:
            self.equal[kind] += 1
        elif sum(reason == row.error.reason for reason, *_ in self.equal) < SHOWN:
            self.equal[kind] = 1
            self.bad.append(row)

    def pass_over(self, reason: str) -> None:
        """Count a row that is not read at all."""
        self.rows += 1
        self.skipped[reason] += 1

    def left_out(self) -> dict[str, int]:
        """How many rows each reason left out: the refused ones first, then those left out by choice."""
        return dict(self.reasons.most_common()) | dict(self.skipped)


def scan(
    spec: str,
    *,
    view: View | None = None,
    roots: Mapping[str, Path] | None = None,
    on_bad_row: OnBadRow = "error",
    on_bad: Callable[[BadRow], None] | None = None,
) -> Scan:
    """A pass over one dataset in a view; memory holds a batch of it, unless a seed asks for another order.

    With `on_bad_row` "error" the whole dataset is read and bad rows are collected before DataError is raised, so use
    no record before the iteration has ended. "skip" leaves bad rows out and counts them. Either raises DataError when
    no record was left; "collect" leaves that to the caller, too. `on_bad` is called with every bad row.
    """
    if view is not None and view not in VIEWS:
        raise UsageError(f"view {view!r} is not known;{nearest(view, VIEWS)}")
    dataset = find(spec)
    if dataset.config.mix:
        raise UsageError(f"{dataset.name}: is a mixture, which is not read in one pass; scan its members")

    def batches(found: Scan) -> Iterator[list[Record]]:
        digest = Digest()
        records = _read(dataset, found, view, roots, on_bad)
        if dataset.config.seed is not None:
            records = _sample(records, dataset.config.seed, dataset.config.limit)
        if view is not None:
            records = _in_view(records, view, found)
        yield from _batches(records, digest, found)
        found.digest, found.repeated = digest.value, digest.repeated
        if on_bad_row == "error" and found.reasons:
            raise DataError(tell(found.name, found.bad, found.rows, found.reasons, found.equal))
        if on_bad_row != "collect" and not found.kept:
            first = f"\n  {found.bad[0]}" if found.bad else ""
            raise DataError(nothing_left(found.name, found.rows, found.left_out()) + first)

    return Scan(dataset.name, batches)


def _batches(records: Iterator[Record], digest: Digest, found: Scan) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        size += digest.add(record)
        batch.append(record)
        if len(batch) == BATCH or size >= LARGEST_BATCH:
            found.kept += len(batch)
            yield batch
            batch, size = [], 0
    if batch:
        found.kept += len(batch)
        yield batch


def nothing_left(name: str, rows: int, reasons: Mapping[str, int]) -> str:
    """The message about a dataset of which no record can be used."""
    if not rows:
        return f"{name}: 0 rows; the file is empty; give data"
    table = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"{name}: 0 of {rows} rows can be used ({table}); mend the data or give other data"


def read_row(row: dict[str, Any], format_name: str, layout: RowLayout) -> list[Record]:
    """The records of one raw row, checked; raises RowError or RowSkipped, be it for one of several examples in it."""
    known = FORMATS[format_name]
    row = unpack_row(row)
    records: list[Record] = []
    for part in (row,) if known.reshape is None else known.reshape(row, layout):
        if isinstance(part, RowSkipped):
            raise part
        records += _read_part(part, known, layout)
    return records


def _read_part(row: Row, known: Format, layout: RowLayout) -> list[Record]:
    records = known.read(row, layout)
    plan = layout.plan(row)
    for record in records:
        if plan.extras:
            _add_extras(record, row, plan)
        if plan.unused:
            record.meta = record.meta | {key: row[key] for key in plan.unused}
        check_record(record)
    return records


def _add_extras(record: Record, row: Row, plan: ColumnRoles) -> None:
    for part, column in plan.extras:
        value = row[column]
        if part == "id":
            record.id = None if value is None or value == "" else str(value)
        elif part == "tools":
            record.tools = read_tools(value, column)
        elif part == "meta":
            record.meta = read_meta(value, column)
        elif (number := read_number(value, column)) is not None:
            given = record.weight if part == "weight" else None
            setattr(record, part, number if given is None else number * given)


def _read(
    dataset: Dataset,
    found: Scan,
    view: View | None,
    roots: Mapping[str, Path] | None,
    on_bad: Callable[[BadRow], None] | None,
) -> Iterator[Record]:
    """The records of a dataset as their rows make them, up to its limit unless a sample is wanted."""
    config = dataset.config
    rows, format_name = _decide_format(dataset, _open(dataset, roots, found.notes), found.notes)
    if rows is None:
        return
    known = FORMATS[format_name]
    layout = make_layout(config, format_name, view)
    if format_name == "votes":
        rows = VoteFilterPass(found.name, config.votes, found.pass_over).select(rows)
    elif format_name == "message_rows":
        rows = join_messages(rows, found.name, config.columns)
    if format_name != "votes" and (asked := config.votes.asked):
        raise UsageError(
            f"{found.name}: asked for {', '.join(asked)}, which only votes have; these rows are {format_name}; "
            "take it out"
        )
    limit = config.limit if config.seed is None else None
    with contextlib.closing(_read_rows(rows, _RowReader(known, layout, found, on_bad))) as records:
        wanted = _on_side(records, config) if config.part else records
        yield from itertools.islice(wanted, limit)


def _on_side(records: Iterable[Record], config: DatasetConfig) -> Iterator[Record]:
    return (record for record in records if is_held_out(record, config.test_share) == (config.part == "test"))


def _open(dataset: Dataset, roots: Mapping[str, Path] | None, notes: list[str]) -> Iterator[RawRow]:
    config = dataset.config
    if config.source.startswith("hf://"):
        return containers.read_hub(config.source.removeprefix("hf://"), config.subset, config.split, config.revision)
    if config.revision:
        raise UsageError(f"{dataset.name}: only hub datasets have a revision; take it out")
    try:
        path = _resolve(dataset, roots or {})
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(f"{dataset.name}: cannot be read ({error.strerror}); check the path") from None
    shown = config.source if path == Path(config.source) else path.name
    reading = ReadOptions(
        config.encoding,
        tuple(config.header),
        config.quoting,
        config.rows_at,
        config.split,
        config.subset,
        appended=config.format == "votes",
    )
    return containers.read_path(path, shown, notes, reading)


def check_there(dataset: Dataset) -> None:
    """Raise DataError when the file or folder of a dataset is not there."""
    containers.check_path(_resolve(dataset, {}), dataset.config.source)


def _resolve(dataset: Dataset, roots: Mapping[str, Path]) -> Path:
    scheme, found, rest = dataset.config.source.partition("://")
    if not found:
        beside = dataset.folder / dataset.config.source
        return beside if beside.exists() else Path(dataset.config.source).expanduser()
    if scheme not in roots:
        raise DataError(f"{dataset.name}: its source {dataset.config.source} needs a {scheme}; give --{scheme} DIR")
    path = roots[scheme] / rest
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        remedy = "vote on the comparison page first" if dataset.name == "votes" else "run `align quickstart`"
        raise DataError(f"{dataset.name}: nothing is at {dataset.config.source} yet; {remedy}")
    return path


def _decide_format(dataset: Dataset, rows: Iterator[RawRow], notes: list[str]) -> tuple[Iterator[RawRow] | None, str]:
    """All rows again and their format; None in place of the rows when there is not one."""
    head = list(itertools.islice(rows, LOOKED_AT))
    if not head:
        return None, ""
    everything = itertools.chain(head, rows)
    if dataset.config.format != "auto":
        return everything, dataset.config.format
    values = [raw.value for raw in head]
    named = [{"messages": value} if isinstance(value, list) else value for value in values]
    named = [_opened(value) for value in named if isinstance(value, dict)]
    if not named:
        return everything, "text"
    format_name, reason = sniff(named, dataset.name, dataset.config.columns, dataset.config.source)
    notes.append(f"{dataset.name}: format {format_name}, decided by {reason}")
    return everything, format_name


def _opened(row: Row) -> Row:
    """A row with the values that its cells hold as text; as it is when they cannot be read, which is told later."""
    try:
        return unpack_row(row)
    except RowError:
        return row


def _read_rows(rows: Iterator[RawRow], reader: _RowReader) -> Generator[Record, None, None]:
    found, layout = reader.found, reader.layout
    try:
        for raw in rows:
            found.rows += 1
            yield from reader.read(raw)
    finally:
        if reader.unused:
            kept = ", ".join(map(str, itertools.islice(reader.unused, SHOWN)))
            kept += f" and {len(reader.unused) - SHOWN} more" if len(reader.unused) > SHOWN else ""
            found.notes.append(f"{found.name}: columns kept as meta: {kept}{_near_miss(reader.unused, layout)}")
        found.notes += [f"{found.name}: {count} {remark}" for remark, count in layout.remarks.items()]


class _RowReader:
    """Rows of one dataset to records, all of one kind; what is refused or left out goes into the account."""

    def __init__(self, known: Format, layout: RowLayout, found: Scan, on_bad: Callable[[BadRow], None] | None) -> None:
        self.known, self.layout, self.found, self.on_bad = known, layout, found, on_bad
        self.kind: View | None = None
        self.unused: dict[str, None] = {}  # an ordered set

    def read(self, raw: RawRow) -> list[Record]:
        """The records of a row; one of several examples in it that is bad spoils no other."""
        try:
            row = unpack_row(_checked_row(raw, self.known), self.layout.remarks)
            if self.known.reshape is None:
                return self._take(row, raw)
            return [record for part in self.known.reshape(row, self.layout) for record in self._take(part, raw)]
        except RowError as error:
            return self._refuse(raw, error)
        except RowSkipped as skip:
            self.found.skipped[skip.reason] += 1
            return []

    def _take(self, part: PlainRow, raw: RawRow) -> list[Record]:
        if isinstance(part, RowSkipped):
            self.found.skipped[part.reason] += 1
            return []
        try:
            records = _read_part(part, self.known, self.layout)
            for record in records:
                record.source, record.line = raw.source, raw.line
                self._require_kind(record)
                if record.meta:
                    self.unused.update(dict.fromkeys(record.meta))
        except RowError as error:
            return self._refuse(raw, error)
        except RowSkipped as skip:
            self.found.skipped[skip.reason] += 1
            return []
        return records

    def _refuse(self, raw: RawRow, error: RowError) -> list[Record]:
        bad = BadRow(f"{raw.source}:{raw.line}", error, raw.value)
        self.found.refuse(bad)
        if self.on_bad is not None:
            self.on_bad(bad)
        return []

    def _require_kind(self, record: Record) -> None:
        found = natural_view(record)
        if self.kind is None:
            self.kind = found
        if found == self.kind:
            return
        if found == "prompt" and self.kind == "demonstration":
            raise RowError("no assistant turn", "row", "has no assistant turn", "add an answer or remove the row")
        problem = f"is {a_kind(found)} row among {self.kind} rows"
        raise RowError("mixed rows", "row", problem, "keep one kind in a dataset")


def _checked_row(raw: RawRow, known: Format) -> Row:
    """The row as columns: a bare string is a text, and a bare list the turns of a conversation."""
    row = raw.value
    if isinstance(row, dict):
        return row
    if isinstance(row, RowError):
        raise row
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, list) and "messages" in known.synonyms:
        return {"messages": row}
    raise RowError("not a row", "row", f"is {kind_of(row)}, not an object", "write {column: value}")


def _near_miss(unused: Iterable[str], layout: RowLayout) -> str:
    """A hint for every unused column whose name is nearly that of an optional part."""
    parts = {name for part, names in layout.synonyms.items() if part not in COMMON for name in names}
    hints = [(name, near) for name in unused if (near := slip_of(str(name), parts))]
    return "".join(f"; did you mean {part} by {name}?" for name, part in hints)


def _sample(records: Iterator[Record], seed: int, limit: int | None) -> Iterator[Record]:
    """The records in a random order, or so many of them: those that drew the smallest numbers, held alone in memory."""
    draw = random.Random(seed).random
    drawn = ((draw(), number, record) for number, record in enumerate(records))
    ordered = sorted(drawn) if limit is None else heapq.nsmallest(limit, drawn)
    return (record for _, _, record in ordered)


def _in_view(records: Iterator[Record], view: View, found: Scan) -> Iterator[Record]:
    for record in records:
        try:
            yield from convert(record, view, found.name)
        except RowSkipped as skip:
            found.skipped[skip.reason] += 1
