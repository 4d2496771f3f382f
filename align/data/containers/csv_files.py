"""CSV and TSV, row by row. Cells stay text: an answer "NA" or "null" is an answer."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from align.data.containers.data_files import DataFile
from align.data.row_errors import RawRow, RowError
from align.errors import DataError, shorten

_QUOTING = {"none": csv.QUOTE_NONE, "csv": csv.QUOTE_MINIMAL}
_OTHER_SEPARATORS = ("\t", ";", "|")
_MAX_BLANK_LINES = 1_000_000
_QUOTED_LIST = re.compile(r'"(array\()?\s*(\[\s*(\{|$)|\{""|\{\')')
_LONGEST_CELL = 64 << 20
"""Characters of one cell; more than that is a quote that was never closed."""


def read_csv(file: DataFile) -> Iterator[RawRow]:
    """Return the rows of a `.csv` file; another separator is taken when the header has it and no comma."""
    first = next(file.decoded_lines(), "")
    separator = next((sign for sign in (",", *_OTHER_SEPARATORS) if sign in first), ",")
    if separator != ",":
        file.note(f"its cells are separated by {separator!r}, not by commas")
    return _read_rows(file, separator, "csv" if file.options.quoting == "auto" else file.options.quoting)


def read_tsv(file: DataFile) -> Iterator[RawRow]:
    """Return the rows of a `.tsv` file, which come with and without quoting."""
    quoting = file.options.quoting
    if quoting == "auto":
        # A quote that is only a character swallows whole rows, so both ways are tried.
        misfits = {way: sum(isinstance(row.value, RowError) for row in _read_rows(file, "\t", way)) for way in _QUOTING}
        quoting = "csv" if misfits["csv"] < misfits["none"] else "none"
        if quoting == "csv":
            file.note("quotes were read as CSV quoting, because more rows then fit the header")
        elif misfits["csv"] == misfits["none"] and any(map(_quotes_a_list, file.decoded_lines())):
            quoting = "csv"
            file.note("quotes were read as CSV quoting, because they hold lists of objects together")
    return _read_rows(file, "\t", quoting)


def _quotes_a_list(line: str) -> bool:
    """Return whether a cell of a line is a list of objects (JSON or Python) in the quotes of a table."""
    return any(map(_QUOTED_LIST.match, line.split("\t")))


def _read_rows(file: DataFile, separator: str, quoting: str) -> Iterator[RawRow]:
    csv.field_size_limit(_LONGEST_CELL)
    table = csv.reader(_csv_lines(file), delimiter=separator, quoting=_QUOTING[quoting])  # type: ignore[arg-type]
    start, header, blank = 1, list(file.options.header), 0
    while True:
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise DataError(
                f"{file.name}:{start}: no readable table ({error}); close the quotes, or write `quoting: none`"
            ) from None
        if cells is None:
            return
        blank = 0 if cells else blank + 1
        if blank > _MAX_BLANK_LINES:
            raise DataError(f"{file.name}:{start}: more than {_MAX_BLANK_LINES:,} blank lines in a row; remove them")
        if cells and not header:
            header = _check_header(cells, file, start)
        elif cells:
            yield RawRow(file.name, start, _name_cells(header, cells))
        start = table.line_num + 1


def _csv_lines(file: DataFile) -> Iterator[str]:
    for line in file.decoded_lines():
        # The csv module refuses a lone CR inside a line; outside quotes it ends one.
        yield from io.StringIO(line, newline="") if "\r" in line else (line,)


def _check_header(cells: list[str], file: DataFile, line: int) -> list[str]:
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise DataError(
            f"{file.name}:{line} {shorten(twice)}: written twice in the header; rename one, "
            "or give `header: [...]` in a dataset YAML if the file has no header"
        )
    return cells


def _name_cells(header: list[str], cells: list[str]) -> Any:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    problem = f"has {len(cells)} cells where the header has {len(header)}"
    return RowError("wrong number of cells", "row", problem, "quote cells that hold the separator")
