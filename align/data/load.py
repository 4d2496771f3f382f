"""Reading a dataset or a mixture: batch by batch (`open_scan`), or all of it in memory (`load_records`).

open_source -> choose_format -> select_votes, join rows -> RowReader -> part -> sample or limit -> view -> digest
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.data.catalog import Dataset, check_source, find_dataset, member_spec, open_source, source_datasets
from align.data.dataset_config import MixtureDataset, SourceDataset, VoteDataset
from align.data.formats import FORMATS
from align.data.mixtures import interleave, share_rows
from align.data.read_rows import RowReader, choose_format
from align.data.record_sets import Digest, RecordSet, digest_records, find_problems
from align.data.row_errors import BadRow, BadRows, RawRow, RowSkipped
from align.data.split import is_held_out
from align.data.views import convert, natural_view
from align.data.vote_filter import VoteFilter, VoteFilterPass
from align.errors import DataError, UsageError, nearest
from align.schema import VIEWS, Record, View

BATCH = 1000
"""The most records a batch of a scan holds."""
LARGEST_BATCH = 4 << 20
"""Bytes of content after which a batch ends early, so that long records do not add up."""

OnBadRow = Literal["error", "skip", "collect"]


@dataclass(frozen=True)
class ScanOptions:
    """The view that is asked for, and what happens to rows that cannot be used."""

    view: View | None = None
    roots: Mapping[str, Path] = field(default_factory=dict)
    """folders that sources such as `registry://votes/` begin at, by scheme"""
    on_bad_row: OnBadRow = "error"
    on_bad: Callable[[BadRow], None] | None = None
    """called with every bad row"""


class Scan:
    """One reading of a dataset: iterate it once and get batches of at most `BATCH` records.

    While it runs and afterwards it carries the account: `rows` (raw rows read), `kept` (records given), `bad` (refused
    rows, by reason), `skipped` (rows left out by choice, by reason) and `notes` (decisions). At the end it carries
    `digest`, and `members` of a mixture: name, digest and rows of each, and how many rows it has (`of`).
    """

    def __init__(self, name: str, batches: Callable[[Scan], Iterator[list[Record]]]) -> None:
        self.name = name
        self.rows = 0
        self.kept = 0
        self.bad = BadRows()
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.digest = ""
        self.members: list[dict[str, Any]] = []
        self._batches = batches

    def __iter__(self) -> Iterator[list[Record]]:
        """Yield the batches; DataError at the end when bad rows are errors or nothing was left."""
        return self._batches(self)

    def records(self) -> Iterator[Record]:
        """Yield the records one by one."""
        return itertools.chain.from_iterable(self)

    def skip(self, reason: str) -> None:
        """Count a row that is left out by choice."""
        self.skipped[reason] += 1

    def drop_counts(self) -> dict[str, int]:
        """Return how many rows each reason left out: the refused ones first, then those left out by choice."""
        return dict(self.bad.reasons.most_common()) | dict(self.skipped)

    def add_account(self, part: Scan) -> None:
        """Add what a scan of a member counted and noted."""
        self.rows += part.rows
        self.bad.update(part.bad)
        self.skipped.update(part.skipped)
        self.notes += part.notes


def open_scan(
    spec: str,
    *,
    view: View | None = None,
    roots: Mapping[str, Path] | None = None,
    on_bad_row: OnBadRow = "error",
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
    options = ScanOptions(view, roots or {}, on_bad_row, on_bad)
    if isinstance(dataset.config, MixtureDataset):
        list(source_datasets(dataset))  # unknown members and circles are refused before anything is read
    return _scan_dataset(dataset, options)


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
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    notes: list[str] = []
    members: list[dict[str, Any]] = []
    scans = [
        open_scan(one, view=view, roots=roots, on_bad_row=on_bad_row)
        for one in ([spec] if isinstance(spec, str) else spec)
    ]
    for scan in scans:
        records += scan.records()
        dropped.update(scan.drop_counts())
        notes += scan.notes
        members += scan.members or [{"name": scan.name, "digest": scan.digest, "rows": scan.kept}]
    name = "+".join(scan.name for scan in scans)
    digest = scans[0].digest if len(scans) == 1 else digest_records(records)
    return RecordSet(records, name, digest, len(records), dict(dropped), [*notes, *find_problems(records)], members)


def require_files(specs: list[str]) -> None:
    """Raise DataError when data is named that is not there, without reading any of it."""
    for spec in specs:
        for dataset in source_datasets(find_dataset(spec)):
            check_source(dataset)


def _scan_dataset(dataset: Dataset, options: ScanOptions) -> Scan:
    config = dataset.config
    if isinstance(config, MixtureDataset):
        return Scan(dataset.name, lambda scan: _mix_batches(scan, dataset, config, options))
    return Scan(dataset.name, lambda scan: _source_batches(scan, dataset, config, options))


def _source_batches(
    scan: Scan, dataset: Dataset, config: SourceDataset, options: ScanOptions
) -> Iterator[list[Record]]:
    records = _read_records(scan, dataset, config, options)
    if config.seed is not None:
        records = _sample(records, config.seed, config.limit)
    if options.view is not None:
        records = _in_view(records, options.view, scan)
    yield from _in_batches(records, scan)
    if options.on_bad_row == "error" and scan.bad.reasons:
        raise DataError(scan.bad.message(scan.name, scan.rows))
    if options.on_bad_row != "collect" and not scan.kept:
        raise DataError(_nothing_left(scan))


def _read_records(scan: Scan, dataset: Dataset, config: SourceDataset, options: ScanOptions) -> Iterator[Record]:
    """Yield the records of a dataset in the order of its rows, up to its limit unless a sample is wanted."""
    rows = open_source(dataset, options.roots, scan.notes)
    first = next(rows, None)
    if first is None:
        return
    rows, format_name = choose_format(config, dataset.name, itertools.chain([first], rows), scan.notes)
    row_format = FORMATS[format_name]
    rows = _select_votes(rows, scan, config, format_name)
    if row_format.join is not None:
        rows = row_format.join(rows, scan.name, config.columns)

    def refuse(row: BadRow) -> None:
        scan.bad.add(row)
        if options.on_bad is not None:
            options.on_bad(row)

    reader = RowReader(row_format, config.row_layout(format_name, options.view), refuse, scan.skip)
    with contextlib.closing(_read_rows(rows, reader, scan)) as records:
        wanted = _on_side(records, config) if config.part else records
        yield from itertools.islice(wanted, config.limit if config.seed is None else None)


def _select_votes(rows: Iterator[RawRow], scan: Scan, config: SourceDataset, format_name: str) -> Iterator[RawRow]:
    """Return the votes that are wanted, each once; rows of another format as they are."""
    wanted = config.vote_filter if isinstance(config, VoteDataset) else None
    if format_name != "votes":
        if wanted and wanted.settings:
            settings = ", ".join(wanted.settings)
            problem = f"which only votes have; these rows are {format_name}"
            raise UsageError(f"{scan.name}: asked for {settings}, {problem}; take it out")
        return rows

    def leave_out(reason: str) -> None:
        scan.rows += 1
        scan.skip(reason)

    return VoteFilterPass(scan.name, wanted or VoteFilter(), leave_out).select(rows)


def _read_rows(rows: Iterator[RawRow], reader: RowReader, scan: Scan) -> Generator[Record, None, None]:
    try:
        for raw in rows:
            scan.rows += 1
            yield from reader.read(raw)
    finally:
        scan.notes += [f"{scan.name}: {note}" for note in reader.notes()]


def _on_side(records: Iterable[Record], config: SourceDataset) -> Iterator[Record]:
    return (record for record in records if is_held_out(record, config.test_share) == (config.part == "test"))


def _sample(records: Iterator[Record], seed: int, limit: int | None) -> Iterator[Record]:
    """Return the records in a random order, or `limit` of them: those with the smallest random numbers."""
    draw = random.Random(seed).random
    numbered = ((draw(), number, record) for number, record in enumerate(records))
    ordered = sorted(numbered) if limit is None else heapq.nsmallest(limit, numbered)
    return (record for _, _, record in ordered)


def _in_view(records: Iterator[Record], view: View, scan: Scan) -> Iterator[Record]:
    for record in records:
        try:
            yield from convert(record, view, scan.name)
        except RowSkipped as skip:
            scan.skip(skip.reason)


def _in_batches(records: Iterable[Record], scan: Scan) -> Iterator[list[Record]]:
    digest = Digest()
    batch: list[Record] = []
    size = 0
    for record in records:
        size += digest.add(record)
        batch.append(record)
        if len(batch) == BATCH or size >= LARGEST_BATCH:
            scan.kept += len(batch)
            yield batch
            batch, size = [], 0
    if batch:
        scan.kept += len(batch)
        yield batch
    scan.digest = digest.value


def _nothing_left(scan: Scan) -> str:
    if not scan.rows:
        return f"{scan.name}: 0 rows; the file is empty; give data"
    table = ", ".join(f"{reason}: {count}" for reason, count in scan.drop_counts().items())
    first = f"\n  {scan.bad.shown[0]}" if scan.bad.shown else ""
    return f"{scan.name}: 0 of {scan.rows} rows can be used ({table}); correct the data or give other data{first}"


def _mix_batches(scan: Scan, dataset: Dataset, config: MixtureDataset, options: ScanOptions) -> Iterator[list[Record]]:
    """Yield the mixed rows, once every member was read: how many rows there are is known only then."""
    names = [member.name for member in config.mix]
    parts = [_scan_dataset(find_dataset(member_spec(member, dataset.folder)), options) for member in config.mix]
    sets: list[list[Record]] = []
    for part in parts:
        sets.append(list(part.records()))
        scan.add_account(part)
    _require_one_kind(dataset.name, names, sets)
    if not all(sets):
        return
    try:
        counts = share_rows(config, dict(zip(names, map(len, sets), strict=True)))
    except DataError as error:
        raise DataError(f"{dataset.name}: {error}") from None
    listed = [f"{count} of {name} ({len(rows)})" for (name, count), rows in zip(counts.items(), sets, strict=True)]
    scan.notes.append(f"{dataset.name}: mixes {', '.join(listed)}")
    scan.members = [
        {"name": name, "digest": part.digest, "rows": counts[name], "of": len(rows)}
        for name, part, rows in zip(names, parts, sets, strict=True)
    ]
    yield from _in_batches(interleave(sets, list(counts.values()), config.seed), scan)


def _require_one_kind(dataset: str, names: list[str], sets: list[list[Record]]) -> None:
    kinds = {name: natural_view(records[0]) for name, records in zip(names, sets, strict=True) if records}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} gives {kind}" for name, kind in kinds.items())
        raise DataError(f"{dataset}: its members differ in kind ({listed}); ask for a view that all can give")
