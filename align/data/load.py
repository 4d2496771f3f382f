"""Reading a dataset or a mixture: batch by batch (`open_scan`), or all of it in memory (`load_records`).

open_source -> choose_format -> rows joined or votes chosen -> records, checked one by one -> part -> sample or limit
-> view -> digest
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from align.data.catalog import Dataset, MixtureDataset, SourceDataset, find_dataset, find_members, source_datasets
from align.data.formats import FORMATS, SAMPLE_ROWS, Format, detect_format, find_misspelt
from align.data.formats.cells import unpack_row
from align.data.formats.reshaping import PlainRow
from align.data.formats.row_layout import COMMON, Row, RowLayout, read_meta, read_number, read_tools
from align.data.formats.turns import kind_of, same_answers, with_system
from align.data.mixtures import interleave, require_one_kind, share_rows
from align.data.record_sets import Digest, RecordSet, convert, digest_records, find_problems, natural_view
from align.data.row_errors import SHOWN, BadRow, BadRows, RawRow, RowError, RowSkipped
from align.data.sources import open_source
from align.data.split import is_held_out
from align.data.vote_filter import VoteFilter, select_votes
from align.errors import DataError, UsageError, nearest
from align.schema import VIEWS, Record, View, with_article

BATCH = 1000
"""The most records a batch of a scan holds."""
LARGEST_BATCH = 4 << 20
"""Bytes of content after which a batch ends early, so that long records do not add up."""


@dataclass
class Scan:
    """One reading of a dataset: iterate it once and get batches of at most `BATCH` records.

    While it runs and afterwards it carries the account; at the end also `digest` and `members`.
    """

    dataset: Dataset
    view: View | None = None
    roots: Mapping[str, Path] = field(default_factory=dict)
    """folders that sources such as `registry://votes/` begin at, by scheme"""
    on_bad_row: Literal["error", "skip", "collect"] = "error"
    on_bad: Callable[[BadRow], None] | None = None
    """called with every bad row"""
    rows: int = 0
    """raw rows read"""
    kept: int = 0
    """records given"""
    bad: BadRows = field(default_factory=BadRows)
    skipped: Counter[str] = field(default_factory=Counter)
    """rows left out by choice, by reason"""
    notes: list[str] = field(default_factory=list)
    """decisions"""
    digest: str = ""
    members: list[dict[str, Any]] = field(default_factory=list)
    """of a mixture: name, digest and rows of each dataset, and how many rows it has (`of`)"""

    @property
    def name(self) -> str:
        """Return the dataset's name."""
        return self.dataset.name

    def __iter__(self) -> Iterator[list[Record]]:
        """Yield the batches; DataError at the end when bad rows are errors or nothing was left."""
        config = self.dataset.config
        records = _mix(self, config) if isinstance(config, MixtureDataset) else _read(self, config)
        digest = Digest()
        batch: list[Record] = []
        size = 0
        for record in records:
            size += digest.add(record)
            batch.append(record)
            if len(batch) == BATCH or size >= LARGEST_BATCH:
                self.kept += len(batch)
                yield batch
                batch, size = [], 0
        if batch:
            self.kept += len(batch)
            yield batch
        self.digest = digest.value
        if self.on_bad_row == "error" and self.bad.reasons:
            raise DataError(self.bad.message(self.name, self.rows))
        if self.on_bad_row != "collect" and not self.kept:
            raise DataError(self._nothing_left())

    def records(self) -> Iterator[Record]:
        """Yield the records one by one."""
        return itertools.chain.from_iterable(self)

    def skip(self, reason: str) -> None:
        """Count a row that is left out by choice."""
        self.skipped[reason] += 1

    def refuse(self, raw: RawRow, error: RowError) -> None:
        """Count a bad row."""
        row = BadRow(f"{raw.source}:{raw.line}", error, raw.value)
        self.bad.add(row)
        if self.on_bad is not None:
            self.on_bad(row)

    def drop_counts(self) -> dict[str, int]:
        """Return how many rows each reason left out: the refused ones first, then those left out by choice."""
        return dict(self.bad.reasons.most_common()) | dict(self.skipped)

    def _nothing_left(self) -> str:
        if not self.rows:
            return f"{self.name}: 0 rows; the file is empty; give data"
        table = ", ".join(f"{reason}: {count}" for reason, count in self.drop_counts().items())
        first = f"\n  {self.bad.shown[0]}" if self.bad.shown else ""
        return f"{self.name}: 0 of {self.rows} rows can be used ({table}); correct the data or give other data{first}"


def open_scan(
    spec: str,
    *,
    view: View | None = None,
    roots: Mapping[str, Path] | None = None,
    on_bad_row: Literal["error", "skip", "collect"] = "error",
    on_bad: Callable[[BadRow], None] | None = None,
) -> Scan:
    """Return a pass over a dataset or a mixture in a view.

    Memory holds a batch of a dataset, unless a seed asks for another order; a mixture is held whole. With `on_bad_row`
    "error" the whole dataset is read and bad rows are collected before DataError is raised, so use no record before
    the iteration has ended. "skip" leaves bad rows out and counts them. Either raises DataError when no record was
    left; "collect" leaves that to the caller, too. `on_bad` is called with every bad row.
    """
    if view is not None and view not in VIEWS:
        raise UsageError(f"view {view!r} is not known;{nearest(view, VIEWS)}")
    dataset = find_dataset(spec)
    list(source_datasets(dataset))  # unknown members and circles are refused before anything is read
    return Scan(dataset, view, roots or {}, on_bad_row, on_bad)


def load_records(
    spec: str | list[str],
    *,
    view: View | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    roots: Mapping[str, Path] | None = None,
) -> RecordSet:
    """Read one or several datasets and return their records in a view.

    A spec is a name of the catalogue, a file, a folder or `hf://owner/name`, each with options such as `:limit=500`.
    `roots` are the folders of sources such as `registry://votes/`, by scheme. Raises DataError that lists the bad
    rows, unless `on_bad_row` is "skip", which leaves them out and counts them by reason in `dropped`.
    """
    specs = [spec] if isinstance(spec, str) else spec
    scans = [open_scan(one, view=view, roots=roots, on_bad_row=on_bad_row) for one in specs]
    records = [record for scan in scans for record in scan.records()]
    dropped: Counter[str] = Counter()
    notes: list[str] = []
    members: list[dict[str, Any]] = []
    for scan in scans:
        dropped.update(scan.drop_counts())
        notes += scan.notes
        members += scan.members or [{"name": scan.name, "digest": scan.digest, "rows": scan.kept}]
    name = "+".join(scan.name for scan in scans)
    digest = scans[0].digest if len(scans) == 1 else digest_records(records)
    return RecordSet(records, name, digest, len(records), dict(dropped), [*notes, *find_problems(records)], members)


def read_row(row: dict[str, Any], format_name: str, layout: RowLayout) -> list[Record]:
    """Return the records of one raw row, checked; RowError or RowSkipped, be it for one of several examples in it."""
    row_format = FORMATS[format_name]
    parts = _split(unpack_row(row), row_format, layout)
    return [record for part in parts for record in _read_part(part, row_format, layout)]


def _mix(scan: Scan, config: MixtureDataset) -> Iterator[Record]:
    """Yield the mixed rows, once every member was read: how many rows there are is known only then."""
    asked = (scan.view, scan.roots, scan.on_bad_row, scan.on_bad)
    parts = {name: Scan(dataset, *asked) for name, dataset in find_members(scan.dataset, config)}
    sets: dict[str, list[Record]] = {}
    for name, part in parts.items():
        sets[name] = list(part.records())
        scan.rows += part.rows
        scan.bad.update(part.bad)
        scan.skipped.update(part.skipped)
        scan.notes += part.notes
    require_one_kind(scan.name, sets)
    if not all(sets.values()):
        return
    counts = share_rows(config, {name: len(records) for name, records in sets.items()}, scan.name)
    listed = ", ".join(f"{count} of {name} ({len(sets[name])})" for name, count in counts.items())
    scan.notes.append(f"{scan.name}: mixes {listed}")
    scan.members = [
        {"name": name, "digest": part.digest, "rows": counts[name], "of": len(sets[name])}
        for name, part in parts.items()
    ]
    yield from interleave(list(sets.values()), list(counts.values()), config.seed)


def _read(scan: Scan, config: SourceDataset) -> Iterator[Record]:
    """Yield the records of a dataset in its view: in the order of its rows, or a sample of them."""
    rows = open_source(scan.dataset, scan.roots, scan.notes)
    head = list(itertools.islice(rows, SAMPLE_ROWS if config.format == "auto" else 1))
    if not head:
        return
    rows = itertools.chain(head, rows)
    format_name = _detect(head, config, scan) if config.format == "auto" else config.format
    row_format = FORMATS[format_name]
    if row_format.join is not None:
        rows = row_format.join(rows, scan.name, config.columns)
    rows = _counted(rows, scan)
    wanted = config if isinstance(config, VoteFilter) else None
    if format_name == "votes":
        rows = select_votes(rows, scan.name, wanted or VoteFilter(), scan.skip)
    elif wanted and wanted.vote_settings:
        problem = f"which only votes have; these rows are {format_name}"
        raise UsageError(f"{scan.name}: asked for {', '.join(wanted.vote_settings)}, {problem}; take it out")
    layout = config.row_layout(format_name, scan.view)
    with contextlib.closing(_RowReader(row_format, layout, scan).read(rows)) as records:
        for record in _choose_records(records, config):
            try:
                yield from convert(record, scan.view, scan.name)
            except RowSkipped as skip:
                scan.skip(skip.reason)


def _detect(head: list[RawRow], config: SourceDataset, scan: Scan) -> str:
    """Return the format of the first rows, and note it."""
    samples = []
    for raw in head:
        row = {"messages": raw.value} if isinstance(raw.value, list) else raw.value
        if isinstance(row, dict):
            with contextlib.suppress(RowError):  # raised again, with its place, when the row is read
                row = unpack_row(row)
            samples.append(row)
    if not samples:
        return "text"
    format_name, reason = detect_format(samples, scan.name, config.columns, config.source)
    scan.notes.append(f"{scan.name}: format {format_name}, decided by {reason}")
    return format_name


def _counted(rows: Iterable[RawRow], scan: Scan) -> Iterator[RawRow]:
    for raw in rows:
        scan.rows += 1
        yield raw


def _choose_records(records: Iterator[Record], config: SourceDataset) -> Iterator[Record]:
    """Return the records of the wanted part: up to the limit, or those with the smallest random numbers, in order."""
    if config.part:
        asked_for = config.part == "test"
        records = (one for one in records if is_held_out(_as_written(one, config), config.test_share) == asked_for)
    if config.seed is None:
        return itertools.islice(records, config.limit)
    draw = random.Random(config.seed).random
    numbered = ((draw(), number, record) for number, record in enumerate(records))
    ordered = sorted(numbered) if config.limit is None else heapq.nsmallest(config.limit, numbered)
    return (record for _, _, record in ordered)


def _as_written(record: Record, config: SourceDataset) -> Record:
    """Return a record without the default system turn, so that a persona moves no row to the other side of a split."""
    added = config.default_system and record.prompt and record.prompt[0]["content"] == config.default_system
    return replace(record, prompt=record.prompt[1:]) if added and record.prompt else record


class _RowReader:
    """A reader of one dataset's rows, all of one kind; the scan counts those that are refused and skipped."""

    def __init__(self, row_format: Format, layout: RowLayout, scan: Scan) -> None:
        self._format, self._layout, self._scan = row_format, layout, scan
        self._kind: View | None = None
        self._unused: dict[str, None] = {}  # an ordered set

    def read(self, rows: Iterable[RawRow]) -> Generator[Record, None, None]:
        """Yield the records of the rows; at the end, or when closed, note the decisions that were taken about them."""
        try:
            for raw in rows:
                yield from self._read_row(raw)
        finally:
            self._scan.notes += [f"{self._scan.name}: {note}" for note in self._notes()]

    def _read_row(self, raw: RawRow) -> list[Record]:
        """Return the records of a row; one of several examples in it that is bad spoils no other."""
        records: list[Record] = []
        try:
            row = unpack_row(_row_of(raw, self._format), self._layout.decisions)
            for part in _split(row, self._format, self._layout):
                try:
                    read = _read_part(part, self._format, self._layout)
                    for record in read:
                        record.source, record.line = raw.source, raw.line
                        self._require_kind(natural_view(record))
                        if record.meta:
                            self._unused.update(dict.fromkeys(record.meta))
                    records += read
                except RowSkipped as skip:
                    self._scan.skip(skip.reason)
                except RowError as error:
                    self._scan.refuse(raw, error)
        except RowError as error:  # the row as a whole
            self._scan.refuse(raw, error)
            return []
        return records

    def _require_kind(self, kind: View) -> None:
        self._kind = self._kind or kind
        if kind == self._kind:
            return
        if kind == "prompt" and self._kind == "demonstration":
            raise RowError("no assistant turn", "row", "has no assistant turn", "add an answer or remove the row")
        problem = f"is {with_article(kind)} row among {self._kind} rows"
        raise RowError("mixed rows", "row", problem, "keep one kind in a dataset")

    def _notes(self) -> Iterator[str]:
        if self._unused:
            listed = ", ".join(map(str, itertools.islice(self._unused, SHOWN)))
            listed += f" and {len(self._unused) - SHOWN} more" if len(self._unused) > SHOWN else ""
            synonyms = self._layout.synonyms.items()
            names = {name for part, spellings in synonyms if part not in COMMON for name in spellings}
            near = ((column, find_misspelt(str(column), names)) for column in self._unused)
            hints = "".join(f"; did you mean {name} by {column}?" for column, name in near if name)
            yield f"columns kept as meta: {listed}{hints}"
        yield from (f"{count} {decision}" for decision, count in self._layout.decisions.items())


def _row_of(raw: RawRow, row_format: Format) -> Row:
    """Return the row as columns: a bare string is a text, and a bare list the turns of a conversation."""
    match raw.value:
        case dict() as row:
            return row
        case RowError() as error:
            raise error
        case str() as text:
            return {"text": text}
        case list() as turns if "messages" in row_format.columns:
            return {"messages": turns}
        case other:
            raise RowError("not a row", "row", f"is {kind_of(other)}, not an object", "write {column: value}")


def _split(row: Row, row_format: Format, layout: RowLayout) -> Iterable[PlainRow]:
    return (row,) if row_format.split is None else row_format.split(row, layout)


def _read_part(row: PlainRow, row_format: Format, layout: RowLayout) -> list[Record]:
    if isinstance(row, RowSkipped):
        raise row
    records = row_format.read(row, layout)
    roles = layout.roles(row)
    for record in records:
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
        if layout.default_system and record.text is None and not _begins_with_system(record):
            record.prompt = with_system(record.prompt, layout.default_system)
        if roles.unused:
            record.meta = record.meta | {key: row[key] for key in roles.unused}
        _check_record(record)
    return records


def _begins_with_system(record: Record) -> bool:
    return bool(record.prompt) and record.prompt[0]["role"] == "system"


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
