"""Converting: any dataset in, a file in a public shape out, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from align.data.row_errors import RowSkipped
from align.data.shapes import SHAPES, Row
from align.data.writing import write_rows
from align.errors import DataError, UsageError, nearest
from align.schema import Record


@dataclass
class ConversionCounts:
    """What became of the records: how many were written, and how many the shape could not hold, by reason."""

    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def convert_records(batches: Iterable[list[Record]], path: Path, suffix: str, shape: str) -> ConversionCounts:
    """Write records to a file in a shape; nothing is left behind when reading fails or no record could be written."""
    if shape not in SHAPES:
        raise UsageError(f"--to {shape}: unknown;{nearest(shape, SHAPES)}")
    if shape == "openai" and suffix == ".parquet":
        raise UsageError(f"{path}: openai takes JSON-lines; write to .jsonl, or give another --to")
    done = ConversionCounts()
    done.written = write_rows(_shaped(batches, shape, path, done.left_out), path, suffix)
    return done


def _shaped(batches: Iterable[list[Record]], shape: str, path: Path, left_out: Counter[str]) -> Iterator[Row]:
    write = SHAPES[shape]
    count = 0
    for batch in batches:
        for record in batch:
            try:
                row = write(record)
            except RowSkipped as skip:
                left_out[skip.reason] += 1
                continue
            count += 1
            yield row
    if not count:
        reasons = ", ".join(f"{reason}: {times}" for reason, times in left_out.items())
        raise DataError(f"{path}: no row can be written as {shape} ({reasons}); give another --to or --view")
