"""Loading: from the name of data to checked records in the view a stage asks for, all of them in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.data.catalog import check_source, find_dataset, source_datasets
from align.data.digest import digest_records
from align.data.scan import open_scan
from align.data.set_checks import find_problems
from align.schema import Record, View


@dataclass(frozen=True)
class RecordSet:
    """Checked records with the digest of their content and counts of what was left out."""

    records: list[Record]
    name: str
    digest: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    members: list[dict[str, Any]] = field(default_factory=list)
    """name, digest and rows of each dataset the records come from"""

    def describe(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        entry = {"name": self.name, "digest": self.digest, "rows": self.rows, "dropped": self.dropped}
        return entry | ({"members": self.members} if len(self.members) > 1 else {})


def load_records(
    spec: str | list[str],
    *,
    view: View | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    roots: Mapping[str, Path] | None = None,
) -> RecordSet:
    """Read one or several datasets and return their records in a view.

    A spec is a name of the catalogue, a file, a folder or `hf://owner/name`, each with options such as `:limit=500`.
    `roots` says where sources like `registry://votes/` lie. Raises DataError that lists the bad rows, unless
    `on_bad_row` is "skip", which leaves them out and counts them by reason in `dropped`.
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
