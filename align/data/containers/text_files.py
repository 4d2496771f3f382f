"""Text files: CSV and TSV row by row, and plain text. Cells stay text: an answer "NA" or "null" is an answer."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain

from align.data.containers.data_files import DataFile
from align.data.row_errors import RawRow, RowError
from align.errors import DataError, shorten

LONGEST_TEXT = 16 << 20
"""A text file of more characters than this is cut at line ends, so that memory holds a part of it."""
_QUOTING = {"none": csv.QUOTE_NONE, "csv": csv.QUOTE_MINIMAL}
_MAX_BLANK_LINES = 1_000_000
_QUOTED_LIST = re.compile(r'"(array\()?\s*(\[\s*(\{|$)|\{""|\{\')')
"""The start of a list of objects (JSON or Python) in the quotes of a table."""
_LONGEST_CELL = 64 << 20
"""Characters of one cell; more than that is a quote that was never closed."""


def read_text_file(file: DataFile) -> Iterator[RawRow]:
    """Yield a text file as one text, or as several when it is too long for one."""
    text, start = "", 1
    for number, line in enumerate(file.decoded_lines(), start=1):
        line = line.replace("\r\n", "\n")
        if text and len(text) + len(line) > LONGEST_TEXT:
            file.note(f"a long text; it was cut at line ends into texts of at most {LONGEST_TEXT >> 20}M characters")
            yield RawRow(file.name, start, {"text": text})
            text, start = "", number
        text += line
    if text:
        yield RawRow(file.name, start, {"text": text})


def read_csv(file: DataFile) -> Iterator[RawRow]:
    """Return the rows of a `.csv` file; another separator is taken when the header has it and no comma."""
    first = next(file.decoded_lines(), "")
    separator = next((sign for sign in (",", "\t", ";", "|") if sign in first), ",")
    if separator != ",":
        file.note(f"its cells are separated by {separator!r}, not by commas")
    return _read_rows(file, separator, "csv" if file.quoting == "auto" else file.quoting)


def read_tsv(file: DataFile) -> Iterator[RawRow]:
    """Return the rows of a `.tsv` file, which come with and without quoting."""
    quoting = file.quoting
    if quoting == "auto":
        # A quote that is only a character swallows whole rows, so both ways are tried.
        misfits = {way: sum(isinstance(row.value, RowError) for row in _read_rows(file, "\t", way)) for way in _QUOTING}
        quoting = "csv" if misfits["csv"] < misfits["none"] else "none"
        if quoting == "csv":
            file.note("quotes were read as CSV quoting, because more rows then fit the header")
        elif misfits["csv"] == misfits["none"] and any(
            _QUOTED_LIST.match(cell) for line in file.decoded_lines() for cell in line.split("\t")
        ):
            quoting = "csv"
            file.note("quotes were read as CSV quoting, because they hold lists of objects together")
    return _read_rows(file, "\t", quoting)


def _read_rows(file: DataFile, separator: str, quoting: str) -> Iterator[RawRow]:
    csv.field_size_limit(_LONGEST_CELL)
    # The csv module refuses a lone CR inside a line; outside quotes it ends one.
    parts = (io.StringIO(line, newline="") if "\r" in line else (line,) for line in file.decoded_lines())
    table = csv.reader(chain.from_iterable(parts), delimiter=separator, quoting=_QUOTING[quoting])  # type: ignore[arg-type]
    start, header, blank = 1, file.header, 0
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
        if not header:
            header = _check_header(cells, file, start)
        elif len(cells) == len(header):
            yield RawRow(file.name, start, dict(zip(header, cells, strict=True)))
        elif cells:
            problem = f"has {len(cells)} cells where the header has {len(header)}"
            value = RowError("wrong number of cells", "row", problem, "quote cells that hold the separator")
            yield RawRow(file.name, start, value)
        start = table.line_num + 1


def _check_header(cells: list[str], file: DataFile, line: int) -> list[str]:
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise DataError(
            f"{file.name}:{line} {shorten(twice)}: written twice in the header; rename one, "
            "or give `header: [...]` in a dataset YAML if the file has no header"
        )
    return cells
