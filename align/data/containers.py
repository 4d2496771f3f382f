"""Files to raw rows: JSON, JSON-lines, CSV, TSV, Parquet, text, gzip, folders of them and hub datasets.

A row comes with its source and line. What the row means is for `readers`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from align.data.problems import RowError
from align.errors import DataError, nearest, shorten

_SPACE = re.compile(r"[ \t\r\n]*")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ROW_LISTS = ("data", "examples", "rows", "train")


class _Parser:
    """JSON, noticing keys written twice: such an object is read as the RowError that says so."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.decode, self.raw_decode = decoder.decode, decoder.raw_decode
        self._sound = True

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        self._sound = False
        return RowError("key written twice", key or repr(key), "written twice", "keep one")

    def row(self, value: Any) -> Any:
        """A decoded row, or what is wrong inside it; it is looked into only once a key was seen twice."""
        return value if self._sound else _inner_error(value) or value


def _inner_error(value: Any) -> RowError | None:
    """The first object with a key written twice anywhere in a value."""
    if isinstance(value, RowError):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((error for part in parts if (error := _inner_error(part))), None)


class RawRow(NamedTuple):
    """A row as its file holds it; `value` is a RowError when the file holds no readable row there."""

    source: str
    line: int
    value: Any


def read_path(path: Path, name: str, notes: list[str]) -> Iterator[RawRow]:
    """The rows of a file or of every data file in a folder; what had to be decided is appended to `notes`."""
    if path.is_dir():
        files = sorted(
            found for found in path.rglob("*") if found.is_file() and _reader(found) and not _hidden(found, path)
        )
        if not files:
            raise DataError(f"{name}: a folder without data files; put one of {', '.join(_READERS)} there")
        for file in files:
            yield from read_path(file, f"{name.rstrip('/')}/{file.relative_to(path).as_posix()}", notes)
        return
    if not path.is_file():
        siblings = [found.name for found in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{name}: no such file;{nearest(path.name, siblings) if siblings else ' check the path'}")
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{name}: files of this kind are not read; convert it to one of {', '.join(_READERS)}")
    yield from reader(path, name, notes)


def read_hub(name: str, subset: str | None, split: str | None) -> Iterator[RawRow]:
    """The rows of a dataset on the Hugging Face hub, from the local cache where it is there."""
    from datasets import load_dataset

    place = f"hf://{name}"
    try:
        rows = load_dataset(name, subset, split=split or "train")
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{place}: the dataset cannot be read ({shorten(reason, 120)}); check name, subset and split, "
            "and the network unless it is in the local cache"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield RawRow(place, number, row)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read_bytes(path: Path, name: str, notes: list[str]) -> bytes:
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            if path.suffix != ".gz":
                notes.append(f"{name}: is gzip although it is not named .gz; it was decompressed")
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{name}: the gzip data is damaged or cut off; fetch the file again") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its permissions") from None
    if content.startswith(_ZSTD):
        raise DataError(f"{name}: is zstd-compressed, which is not read; decompress it with `zstd -d`")
    return content


def _read_text(path: Path, name: str, notes: list[str]) -> str:
    """The whole file as text without BOM; the first undecodable byte is named by line and place in the line."""
    content = _read_bytes(path, name, notes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A BOM is taken off before counting, so the place is counted in the bytes that were decoded.
        start = error.start + (len(content) - len(error.object))
        line = content.count(b"\n", 0, start) + 1
        byte = start - (content.rfind(b"\n", 0, start) + 1) + 1
        raise DataError(
            f"{name}:{line}:{byte}: not UTF-8 (byte 0x{content[start]:02x}); convert the file, "
            "for example with `iconv -f GB18030 -t UTF-8`"
        ) from None


def _read_json(path: Path, name: str, notes: list[str]) -> Iterator[RawRow]:
    text = _read_text(path, name, notes)
    start = _SPACE.match(text).end()  # type: ignore[union-attr]
    if text.startswith("[", start) and not _is_json_line(text, start):
        yield from _array_rows(text, start, name, notes)
    elif _is_json_line(text, start) and "\n" not in text.strip():
        yield from _object_rows(text, name, notes)
    elif _is_json_line(text, start) or not text.startswith("{", start):
        if path.name.removesuffix(".gz").endswith(".json") and start < len(text):
            notes.append(f"{name}: named .json but holds JSON-lines; it was read as such")
        yield from _line_rows(text, name)
    else:
        yield from _object_rows(text, name, notes)


def _read_json_lines(path: Path, name: str, notes: list[str]) -> Iterator[RawRow]:
    text = _read_text(path, name, notes)
    start = _SPACE.match(text).end()  # type: ignore[union-attr]
    if text.startswith("[", start) and not _is_json_line(text, start):
        notes.append(f"{name}: named as JSON-lines but holds a JSON array; it was read as such")
        yield from _array_rows(text, start, name, notes)
    else:
        yield from _line_rows(text, name)


def _is_json_line(text: str, start: int) -> bool:
    """Whether the first line is an object of its own (also a broken one), with other rows after it."""
    line = text[start : text.find("\n", start) if "\n" in text[start:] else len(text)].strip()
    return line.startswith("{") and line.endswith("}")


def _line_rows(text: str, name: str) -> Iterator[RawRow]:
    # Only "\n" ends a line: JSON strings may hold U+2028 and other characters that str.splitlines would cut at.
    parser = _Parser()
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield RawRow(name, number, _parse_line(line, parser))


def _parse_line(line: str, parser: _Parser) -> Any:
    try:
        return parser.row(parser.decode(line))
    except ValueError as error:
        place = f"at character {error.colno}" if isinstance(error, json.JSONDecodeError) else "somewhere"
        problem = f"is not valid JSON {place} ({shorten(line.strip(), 40)})"
        return RowError("invalid JSON", "row", problem, "mend or remove the line")


def _array_rows(text: str, start: int, name: str, notes: list[str]) -> Iterator[RawRow]:
    rows: list[tuple[int, Any]] = []
    line, counted = 1, 0
    for place, value in _items(text, start + 1, name):
        line += text.count("\n", counted, place)
        counted = place
        rows.append((line, value))
    if len(rows) > 1 and rows[0][0] == rows[-1][0]:
        notes.append(f"{name}: a JSON array on one line; rows are numbered in place of lines")
        rows = [(number, value) for number, (_, value) in enumerate(rows, start=1)]
    for line, value in rows:
        yield RawRow(name, line, value)


def _items(text: str, place: int, name: str) -> Iterator[tuple[int, Any]]:
    parser = _Parser()
    place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
    while not text.startswith("]", place):
        try:
            value, end = parser.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise _broken(name, error.lineno, error.msg) from None
        yield place, parser.row(value)
        place = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text.startswith(",", place):
            place = _SPACE.match(text, place + 1).end()  # type: ignore[union-attr]
        elif not text.startswith("]", place):
            raise _broken(name, text.count("\n", 0, place) + 1, "no , or ] after a row")


def _broken(name: str, line: int, reason: str) -> DataError:
    return DataError(f"{name}:{line} not valid JSON: {reason}; mend the file or fetch it again (it may be cut off)")


def _object_rows(text: str, name: str, notes: list[str]) -> Iterator[RawRow]:
    parser = _Parser()
    try:
        whole = parser.decode(text)
    except json.JSONDecodeError as error:
        raise _broken(name, error.lineno, error.msg) from None
    if isinstance(whole, RowError):
        raise DataError(f"{name} {whole.field}: {whole.problem}; {whole.remedy}")
    key = next((key for key in _ROW_LISTS if isinstance(whole.get(key), list)), None)
    if key is None:
        raise DataError(f"{name}: holds one object with {shorten(list(whole))}, not rows; give a list of rows")
    notes.append(f"{name}: the rows are the list under {key!r}, numbered in place of lines")
    for number, value in enumerate(whole[key], start=1):
        yield RawRow(name, number, parser.row(value))


def _read_table(path: Path, name: str, notes: list[str]) -> Iterator[RawRow]:
    text = _read_text(path, name, notes)
    csv.field_size_limit(1 << 30)
    if ".tsv" not in path.suffixes:
        yield from _table_rows(text, name, ",", csv.QUOTE_MINIMAL)
        return
    # Tab-separated files come with and without quoting; a quote that is only a character swallows whole rows.
    plain, quoted = (list(_table_rows(text, name, "\t", style)) for style in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL))
    misfits = [sum(isinstance(row.value, RowError) for row in rows) for rows in (plain, quoted)]
    if misfits[1] < misfits[0]:
        notes.append(f"{name}: quotes were read as CSV quoting, because more rows then fit the header")
    yield from quoted if misfits[1] < misfits[0] else plain


def _table_rows(text: str, name: str, delimiter: str, quoting: int) -> Iterator[RawRow]:
    # Cells stay text: an answer "NA" or "null" is an answer.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    header = next(lines, None)
    if header is None:
        return
    start = lines.line_num + 1
    for cells in lines:
        if cells:
            yield RawRow(name, start, _fit_cells(header, cells))
        start = lines.line_num + 1


def _fit_cells(header: list[str], cells: list[str]) -> Any:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    problem = f"has {len(cells)} cells where the header has {len(header)}"
    return RowError("wrong number of cells", "row", problem, "quote cells that hold the separator")


def _read_parquet(path: Path, name: str, _notes: list[str]) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield RawRow(name, number, row)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{name}: no readable Parquet ({shorten(str(error), 80)}); fetch the file again") from None


def _read_document(path: Path, name: str, notes: list[str]) -> Iterator[RawRow]:
    if text := _read_text(path, name, notes).replace("\r\n", "\n"):
        yield RawRow(name, 1, {"text": text})


_READERS: dict[str, Callable[[Path, str, list[str]], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".txt": _read_document,
}


def _reader(path: Path) -> Callable[[Path, str, list[str]], Iterator[RawRow]] | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return _READERS.get(suffixes[-1].lower()) if suffixes else None
