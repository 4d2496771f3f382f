"""Loading: from the name of data to checked records in the view a stage asks for."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.data import containers
from align.data.catalog import Dataset, find, make_tags
from align.data.containers import RawRow
from align.data.problems import BadRow, RowError, RowSkipped, count_reasons, tell
from align.data.readers import FORMATS, check_record
from align.data.rows import COMMON, Layout, read_number, read_tools
from align.data.sniff import LOOKED_AT, sniff
from align.data.views import a_kind, convert, natural_view
from align.errors import DataError, UsageError, nearest
from align.schema import VIEWS, Record, View

_CONTENT = ("prompt", "completion", "chosen", "rejected", "label", "answer", "text", "tools")
_DIGESTED = (*_CONTENT, "weight", "margin", "score", "id", "meta")


@dataclass(frozen=True)
class RecordSet:
    """Checked records with the digest of their content and what was left out on the way."""

    records: list[Record]
    name: str
    digest: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of the data."""
        return {"name": self.name, "digest": self.digest, "rows": self.rows, "dropped": self.dropped}


@dataclass
class Survey:
    """Everything reading a dataset found: records, bad rows, rows left out by choice, and remarks."""

    name: str
    records: list[Record] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    rows: int = 0


def load_records(
    spec: str | list[str],
    *,
    view: View | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    roots: Mapping[str, Path] | None = None,
) -> RecordSet:
    """Read one or several datasets and give their records in a view.

    A spec is a name of the catalogue, a file, a folder or `hf://owner/name`, each with options such as `:limit=500`.
    `roots` says where sources like `registry://votes/` lie. Raises DataError that lists the bad rows, unless
    `on_bad_row` is "skip", which leaves them out and counts them by reason in `dropped`.
    """
    if view is not None and view not in VIEWS:
        raise UsageError(f"view {view!r} is not known;{nearest(view, VIEWS)}")
    surveys = [survey(one, view=view, roots=roots) for one in ([spec] if isinstance(spec, str) else spec)]
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for found in surveys:
        if found.bad and on_bad_row == "error":
            raise DataError(tell(found.name, found.bad, found.rows))
        dropped.update(count_reasons(found.bad))
        dropped.update(found.skipped)
        if not found.records:
            raise DataError(_nothing_left(found))
        records += found.records
    digest, repeated = digest_records(records)
    notes = [note for found in surveys for note in found.notes]
    if repeated:
        notes.append(f"{repeated} rows repeat an earlier row exactly")
    name = "+".join(found.name for found in surveys)
    return RecordSet(records, name, digest, len(records), dict(dropped), notes)


def survey(spec: str, *, view: View | None = None, roots: Mapping[str, Path] | None = None) -> Survey:
    """Read one dataset and collect what is wrong with it; only what makes it unreadable as a whole is raised."""
    dataset = find(spec)
    config = dataset.config
    found = Survey(dataset.name)
    rows, format_name = _decide_format(dataset, _open(dataset, roots, found.notes), found.notes)
    if rows is None:
        return found
    known = FORMATS[format_name]
    layout = Layout(
        known.synonyms, config.columns, make_tags(config.tags, known.tags), view, config.label_map, config.ties
    )
    first_ones = config.limit if config.seed is None else None
    _read_rows(rows, format_name, layout, found, first_ones)
    if config.seed is not None:
        random.Random(config.seed).shuffle(found.records)
        found.records = found.records[: config.limit]
    if view is not None:
        found.records = _in_view(found, view)
    return found


def digest_records(records: Iterable[Record]) -> tuple[str, int]:
    """Digest of the records' content in order, and how many of them repeat an earlier one.

    Where a record came from (file and line) is not content.
    """
    whole = hashlib.sha256()
    seen: set[bytes] = set()
    count = 0
    for record in records:
        row = {name: value for name in _DIGESTED if (value := getattr(record, name)) not in (None, {})}
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        whole.update(text.encode() + b"\n")
        content = {name: row.get(name) for name in _CONTENT}
        seen.add(hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest())
        count += 1
    return f"sha256:{whole.hexdigest()}", count - len(seen)


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


def _read_rows(rows: Iterator[RawRow], format_name: str, layout: Layout, found: Survey, limit: int | None) -> None:
    kind: str | None = None
    unused: dict[str, None] = {}  # an ordered set
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
            found.bad.append(BadRow(f"{raw.source}:{raw.line}", error, raw.value))
            continue
        unused.update(dict.fromkeys(records[0].meta))
        found.records += records
        if limit is not None and len(found.records) >= limit:
            del found.records[limit:]
            break
    if unused:
        found.notes.append(
            f"{found.name}: columns kept as meta: {', '.join(map(str, unused))}{_near_miss(unused, layout)}"
        )


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


def _in_view(found: Survey, view: View) -> list[Record]:
    records: list[Record] = []
    for record in found.records:
        try:
            records += convert(record, view, found.name)
        except RowSkipped as skip:
            found.skipped[skip.reason] += 1
    return records


def _nothing_left(found: Survey) -> str:
    reasons = count_reasons(found.bad) | dict(found.skipped)
    if not found.rows:
        return f"{found.name}: 0 rows; the file is empty; give data"
    table = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"{found.name}: 0 of {found.rows} rows can be used ({table}); mend the data or give other data"
