"""Scanning: one pass over a dataset of any size, in batches of checked records, and an account of what was left out."""

from __future__ import annotations

import difflib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from align.data import containers
from align.data.catalog import Dataset, find, make_tags
from align.data.containers import RawRow
from align.data.digest import Digest
from align.data.problems import SHOWN, BadRow, RowError, RowSkipped, tell
from align.data.readers import FORMATS, check_record
from align.data.rows import COMMON, Layout, read_number, read_tools
from align.data.sniff import LOOKED_AT, sniff
from align.data.views import a_kind, convert, natural_view
from align.errors import DataError, UsageError, nearest
from align.schema import VIEWS, Record, View

BATCH = 1000
"""The most records a batch of a scan holds."""

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
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.digest = ""
        self.repeated = 0
        self._batches = batches

    def __iter__(self) -> Iterator[list[Record]]:
        """The batches; DataError at the end when bad rows are errors or nothing was left."""
        return self._batches(self)

    def refuse(self, row: BadRow) -> None:
        """Count a bad row, and keep it unless many of its kind were kept already."""
        self.reasons[row.error.reason] += 1
        if self.reasons[row.error.reason] <= SHOWN:
            self.bad.append(row)

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

    def batches(found: Scan) -> Iterator[list[Record]]:
        digest = Digest()
        records = _read(dataset, found, view, roots, on_bad or (lambda _row: None))
        if dataset.config.seed is not None:
            records = _sample(records, dataset.config.seed, dataset.config.limit)
        if view is not None:
            records = _in_view(records, view, found)
        while batch := list(itertools.islice(records, BATCH)):
            found.kept += len(batch)
            for record in batch:
                digest.add(record)
            yield batch
        found.digest, found.repeated = digest.value, digest.repeated
        if on_bad_row == "error" and found.reasons:
            raise DataError(tell(found.name, found.bad, found.rows, found.reasons))
        if on_bad_row != "collect" and not found.kept:
            raise DataError(nothing_left(found.name, found.rows, found.left_out()))

    return Scan(dataset.name, batches)


def nothing_left(name: str, rows: int, reasons: Mapping[str, int]) -> str:
    """The message about a dataset of which no record can be used."""
    if not rows:
        return f"{name}: 0 rows; the file is empty; give data"
    table = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"{name}: 0 of {rows} rows can be used ({table}); mend the data or give other data"


def read_row(row: dict[str, Any], format_name: str, layout: Layout) -> list[Record]:
    """The records of one raw row, checked; raises RowError or RowSkipped."""
    records = FORMATS[format_name].read(row, layout)
    used = layout.used()
    for record in records:
        _add_extras(record, row, layout, used)
        check_record(record)
    return records


def _add_extras(record: Record, row: dict[str, Any], layout: Layout, used: set[str]) -> None:
    for part in ("weight", "margin", "score"):
        column = layout.column(row, part)
        if column is not None:
            setattr(record, part, read_number(row[column], column))
    if (column := layout.column(row, "tools")) is not None:
        record.tools = read_tools(row[column], column)
    number = layout.get(row, "id")
    record.id = None if number is None else str(number)
    record.meta = {key: value for key, value in row.items() if key not in used}


def _read(
    dataset: Dataset,
    found: Scan,
    view: View | None,
    roots: Mapping[str, Path] | None,
    on_bad: Callable[[BadRow], None],
) -> Iterator[Record]:
    """The records of a dataset as their rows make them, up to its limit unless a sample is wanted."""
    config = dataset.config
    rows, format_name = _decide_format(dataset, _open(dataset, roots, found.notes), found.notes)
    if rows is None:
        return
    known = FORMATS[format_name]
    tags = make_tags(config.tags, known.tags)
    layout = Layout(known.synonyms, config.columns, tags, view, config.label_map, config.ties)
    limit = config.limit if config.seed is None else None
    yield from itertools.islice(_read_rows(rows, format_name, layout, found, on_bad), limit)


def _open(dataset: Dataset, roots: Mapping[str, Path] | None, notes: list[str]) -> Iterator[RawRow]:
    config = dataset.config
    if config.source.startswith("hf://"):
        return containers.read_hub(config.source.removeprefix("hf://"), config.subset, config.split)
    if config.split or config.subset:
        raise UsageError(f"{dataset.name}: only hub datasets have a split or subset; name the file of the split")
    path = _resolve(dataset, roots or {})
    shown = config.source if path == Path(config.source) else path.name
    return containers.read_path(path, shown, notes)


def _resolve(dataset: Dataset, roots: Mapping[str, Path]) -> Path:
    scheme, found, rest = dataset.config.source.partition("://")
    if not found:
        beside = dataset.folder / dataset.config.source
        return beside if beside.exists() else Path(dataset.config.source).expanduser()
    if scheme not in roots:
        raise DataError(f"{dataset.name}: its source {dataset.config.source} needs a {scheme}; give --{scheme} DIR")
    path = roots[scheme] / rest
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        remedy = "vote on the comparison page first" if dataset.name == "votes" else "run `python -m align.quickstart`"
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
    named = [row for raw in head if isinstance(row := _as_row(raw.value), dict)]
    if not named:
        return everything, "text"
    format_name, reason = sniff(named, dataset.name)
    notes.append(f"{dataset.name}: format {format_name}, decided by {reason}")
    return everything, format_name


def _as_row(value: Any) -> Any:
    """A bare string is a row of text."""
    return {"text": value} if isinstance(value, str) else value


def _read_rows(
    rows: Iterator[RawRow], format_name: str, layout: Layout, found: Scan, on_bad: Callable[[BadRow], None]
) -> Iterator[Record]:
    kind: str | None = None
    unused: dict[str, None] = {}  # an ordered set
    try:
        for raw in rows:
            found.rows += 1
            try:
                records = _read_raw(raw, format_name, layout)
                kind = kind or natural_view(records[0])
                _require_kind(kind, records[0])
            except RowSkipped as skip:
                found.skipped[skip.reason] += 1
                continue
            except RowError as error:
                bad = BadRow(f"{raw.source}:{raw.line}", error, raw.value)
                found.refuse(bad)
                on_bad(bad)
                continue
            unused.update(dict.fromkeys(records[0].meta))
            yield from records
    finally:
        if unused:
            kept = ", ".join(map(str, unused))
            found.notes.append(f"{found.name}: columns kept as meta: {kept}{_near_miss(unused, layout)}")


def _read_raw(raw: RawRow, format_name: str, layout: Layout) -> list[Record]:
    if isinstance(raw.value, RowError):
        raise raw.value
    row = _as_row(raw.value)
    if not isinstance(row, dict):
        raise RowError("not a row", "row", f"is {type(row).__name__}, not an object", "write {column: value}")
    records = read_row(row, format_name, layout)
    for record in records:
        record.source, record.line = raw.source, raw.line
    return records


def _require_kind(kind: str, record: Record) -> None:
    found = natural_view(record)
    if found == kind:
        return
    if found == "prompt" and kind == "demonstration":
        raise RowError("no assistant turn", "row", "has no assistant turn", "add an answer or remove the row")
    raise RowError("mixed rows", "row", f"is {a_kind(found)} row among {kind} rows", "keep one kind in a dataset")


def _near_miss(unused: Iterable[str], layout: Layout) -> str:
    """A hint for every unused column whose name is nearly that of an optional part."""
    parts = {name for part, names in layout.synonyms.items() if part not in COMMON for name in names}
    pairs = [
        (name, near[0]) for name in unused if (near := difflib.get_close_matches(str(name), parts, 1, cutoff=0.85))
    ]
    return "".join(f"; did you mean {part} by {name}?" for name, part in pairs)


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
