"""Loading: from the name of data to checked records in the view a stage asks for, all of them in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.data.catalog import find
from align.data.digest import digest_records
from align.data.mixtures import Mixture, leaves, open_scan
from align.data.row_errors import BadRow
from align.data.scan import check_there, read_row
from align.data.set_checks import remarks
from align.errors import UsageError, nearest
from align.schema import VIEWS, Record, View

__all__ = ["RecordSet", "Survey", "digest_records", "load_records", "read_row", "require_files", "survey"]


@dataclass(frozen=True)
class RecordSet:
    """Checked records with the digest of their content and what was left out on the way."""

    records: list[Record]
    name: str
    digest: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    members: list[dict[str, Any]] = field(default_factory=list)
    """name, digest and rows of each dataset the records come from"""

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of the data."""
        account = {"name": self.name, "digest": self.digest, "rows": self.rows, "dropped": self.dropped}
        return account | ({"members": self.members} if len(self.members) > 1 else {})


@dataclass
class Survey:
    """Everything reading a dataset found: records, bad rows, rows left out by choice, and remarks."""

    name: str
    records: list[Record] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    digest: str = ""
    repeated: int = 0


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
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    notes: list[str] = []
    members: list[dict[str, Any]] = []
    names: list[str] = []
    for one in [spec] if isinstance(spec, str) else spec:
        found = open_scan(one, view=view, roots=roots, on_bad_row=on_bad_row)
        before = len(records)
        for batch in found:
            records += batch
        dropped.update(found.left_out())
        notes += found.notes
        names.append(found.name)
        whole = {"name": found.name, "digest": found.digest, "rows": len(records) - before}
        members += found.members if isinstance(found, Mixture) else [whole]
    digest = found.digest if len(names) == 1 else digest_records(records)[0]
    notes += remarks(records)
    return RecordSet(records, "+".join(names), digest, len(records), dict(dropped), notes, members)


def require_files(specs: list[str]) -> None:
    """Raise DataError when data is named that is not there, without reading any of it."""
    for spec in specs:
        for dataset in leaves(find(spec)):
            if "://" not in dataset.config.source:
                check_there(dataset)


def survey(spec: str, *, view: View | None = None, roots: Mapping[str, Path] | None = None) -> Survey:
    """Read one dataset and collect what is wrong with it; only what makes it unreadable as a whole is raised."""
    bad: list[BadRow] = []
    scanned = open_scan(spec, view=view, roots=roots, on_bad_row="collect", on_bad=bad.append)
    records = [record for batch in scanned for record in batch]
    return Survey(
        scanned.name, records, bad, scanned.skipped, scanned.notes, scanned.rows, scanned.digest, scanned.repeated
    )
