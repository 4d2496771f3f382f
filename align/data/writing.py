"""Writing rows to JSON-lines, gzip or Parquet: streamed, and put in place under its name only when it is whole."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from align.errors import MachineError, UsageError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_BATCH = 1000
_COMPRESSION = 6  # the 9 that Python takes is six times as slow for one per cent


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well, and is removed otherwise.

    Raises UsageError where no file can be made, and MachineError when the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); give another place") from None
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MachineError(f"{path}: not written, {error.strerror}; free space or give another place") from None
    finally:
        part.unlink(missing_ok=True)


def check_target(path: Path, *, force: bool) -> str:
    """The suffix that says how to write; UsageError for another one, or for a file that is there already."""
    suffix = next((known for known in reversed(SUFFIXES) if path.name.endswith(known)), None)
    if suffix is None:
        what = "a folder; name a file in it" if path.is_dir() else "is no kind of file that can be written; name it"
        raise UsageError(f"{path}: {what} with the ending {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UsageError(f"{path}: a folder; give another name")
    if path.exists() and not force:
        raise UsageError(f"{path}: there already; give another name, or --force to replace it")
    return suffix


def dump_row(row: Row) -> bytes:
    """A row as one line of JSON with its newline."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # numbers beyond 64 bits, lone surrogates, dates of Parquet files
        return json.dumps(row, default=str).encode() + b"\n"


def write_rows(rows: Iterable[Row], path: Path, suffix: str) -> int:
    """Write rows to `path` in the way its suffix asks for and return how many there were."""
    with replacing(path) as part:
        if suffix == ".parquet":
            return _write_parquet(rows, part)
        with open_lines(part, compress=suffix == ".jsonl.gz") as file:
            return write_lines(rows, file)


@contextmanager
def open_lines(path: Path, *, compress: bool = False) -> Iterator[IO[bytes]]:
    """A file to write lines to; compressed ones carry neither name nor time, so equal rows make equal files."""
    with path.open("wb") as file:
        if not compress:
            yield file
            return
        with gzip.GzipFile("", "wb", _COMPRESSION, fileobj=file, mtime=0) as packed:
            yield packed  # type: ignore[misc]


def write_lines(rows: Iterable[Row], file: IO[bytes]) -> int:
    """Write rows as JSON-lines and return how many there were."""
    count = 0
    for row in rows:
        file.write(dump_row(row))
        count += 1
    return count


def _write_parquet(rows: Iterable[Row], path: Path) -> int:
    """Rows go to a file of lines first: which columns there are and what they hold is known only at their end."""
    import pyarrow
    import pyarrow.parquet

    kinds: dict[str, set[str]] = {}
    lines = path.with_name(path.name + ".rows")
    try:
        with lines.open("wb") as file:
            count = write_lines(_watched(rows, kinds), file)
        schema = pyarrow.schema([(name, _arrow_type(seen)) for name, seen in kinds.items()])
        with lines.open("rb") as file, pyarrow.parquet.ParquetWriter(path, schema) as writer:
            while batch := [json.loads(line) for line in itertools.islice(file, _BATCH)]:
                flat = [{name: _flat(value, kinds[name]) for name, value in row.items()} for row in batch]
                writer.write_table(pyarrow.Table.from_pylist(flat, schema=schema))
    finally:
        lines.unlink(missing_ok=True)
    return count


def _watched(rows: Iterable[Row], kinds: dict[str, set[str]]) -> Iterator[Row]:
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).update(_kind(value))
        yield row


def _kind(value: Any) -> set[str]:
    """What a column must be able to hold: a plain type, the keys of turns (`turns`, `turn`), pairs, or any JSON."""
    if isinstance(value, bool):
        return {"bool"}
    if isinstance(value, (int, float)):
        return {"number"}
    if isinstance(value, str):
        return {"text"}
    if isinstance(value, dict) and "value" in value and "from" in value:
        return {"turn", *(f".{key}" for key in value)}
    if isinstance(value, list) and value:
        if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value):
            return {"turns", *(f".{key}" for turn in value for key in turn)}
        if all(isinstance(pair, list) and all(isinstance(text, str) for text in pair) for pair in value):
            return {"pairs"}
    return {"json"}


def _arrow_type(seen: set[str]) -> Any:
    import pyarrow

    text, kinds = pyarrow.string(), {kind for kind in seen if not kind.startswith(".")}
    plain = {"bool": pyarrow.bool_(), "number": pyarrow.float64(), "pairs": pyarrow.list_(pyarrow.list_(text))}
    if len(kinds) != 1 or kinds <= {"json", "text"}:
        return text
    [kind] = kinds
    if kind in plain:
        return plain[kind]
    function = pyarrow.struct([("name", text), ("arguments", text)])
    calls = pyarrow.list_(pyarrow.struct([("type", text), ("id", text), ("function", function)]))
    types = {".train": pyarrow.bool_(), ".tool_calls": calls}
    fields = sorted((key for key in seen if key.startswith(".")), key=lambda key: (key not in _FIRST, key))
    turn = pyarrow.struct([(key[1:], types.get(key, text)) for key in fields])
    return turn if kind == "turn" else pyarrow.list_(turn)


_FIRST = (".role", ".content", ".from", ".value")


def _flat(value: Any, seen: set[str]) -> Any:
    """A value as its column holds it; what no plain type fits is JSON text."""
    kinds = {kind for kind in seen if not kind.startswith(".")}
    if len(kinds) != 1 or kinds == {"json"}:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if kinds == {"turns"}:
        return [_flat_turn(turn) for turn in value]
    return value


def _flat_turn(turn: Row) -> Row:
    if not turn.get("tool_calls"):
        return turn
    return turn | {"tool_calls": [call | {"function": _flat_function(call["function"])} for call in turn["tool_calls"]]}


def _flat_function(function: Row) -> Row:
    arguments = function["arguments"]
    return function | {"arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
