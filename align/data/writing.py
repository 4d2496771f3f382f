"""Writing rows to JSON-lines, gzip or Parquet: streamed, and put in place under its name only when it is whole."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from align.errors import MachineError, UsageError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_BATCH = 1000
_COMPRESSION = 6  # the 9 that Python takes is six times as slow for one per cent
_FIRST_KEYS = (".role", ".content", ".from", ".value")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its name when the block ends well, and is removed otherwise.

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
    """Return the suffix, which decides how rows are written; UsageError for another one or an existing file."""
    suffix = next((ending for ending in reversed(SUFFIXES) if path.name.endswith(ending)), None)
    if suffix is None:
        problem = "a folder; name a file in it" if path.is_dir() else "is no kind of file that can be written; name it"
        raise UsageError(f"{path}: {problem} with the ending {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UsageError(f"{path}: a folder; give another name")
    if path.exists() and not force:
        raise UsageError(f"{path}: there already; give another name, or --force to replace it")
    return suffix


def dump_row(row: Row) -> bytes:
    """Return a row as one line of JSON with its newline."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # numbers beyond 64 bits, lone surrogates, dates of Parquet files
        return json.dumps(row, default=str).encode() + b"\n"


def write_rows(rows: Iterable[Row], path: Path, suffix: str) -> int:
    """Write rows to `path` in the way its suffix asks for and return how many there were."""
    count = 0
    with replacing(path) as part:
        if suffix == ".parquet":
            return _write_parquet(rows, part)
        with ExitStack() as stack:
            file: IO[bytes] | gzip.GzipFile = stack.enter_context(part.open("wb"))
            if suffix == ".jsonl.gz":
                # Neither name nor time, so that equal rows make equal files.
                file = stack.enter_context(gzip.GzipFile("", "wb", _COMPRESSION, fileobj=file, mtime=0))
            for row in rows:
                file.write(dump_row(row))
                count += 1
    return count


def _write_parquet(rows: Iterable[Row], path: Path) -> int:
    """Write rows to a file of lines first: the columns and their types are known only at its end."""
    import pyarrow
    import pyarrow.parquet

    columns, count = dict[str, set[str]](), 0
    lines = path.with_name(path.name + ".rows")
    try:
        with lines.open("wb") as file:
            for row in rows:
                for name, value in row.items():
                    columns.setdefault(name, set()).update(_kinds(value))
                file.write(dump_row(row))
                count += 1
        schema = pyarrow.schema([(name, _arrow_type(kinds)) for name, kinds in columns.items()])
        with lines.open("rb") as file, pyarrow.parquet.ParquetWriter(path, schema) as writer:
            while batch := [json.loads(line) for line in itertools.islice(file, _BATCH)]:
                cells = [{name: _to_cell(value, columns[name]) for name, value in row.items()} for row in batch]
                writer.write_table(pyarrow.Table.from_pylist(cells, schema=schema))
    finally:
        lines.unlink(missing_ok=True)
    return count


def _kinds(value: Any) -> set[str]:
    """Return the kind of a value: a plain type, `turn` or `turns` with `.key` for each key, `pairs`, or `json`."""
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


def _column_kind(kinds: set[str]) -> str:
    """Return the kind that all values of a column have, or `json`."""
    plain = {kind for kind in kinds if not kind.startswith(".")}
    return plain.pop() if len(plain) == 1 else "json"


def _arrow_type(kinds: set[str]) -> Any:
    import pyarrow

    text = pyarrow.string()
    function = pyarrow.struct([("name", text), ("arguments", text)])
    calls = pyarrow.list_(pyarrow.struct([("type", text), ("id", text), ("function", function)]))
    types = {".train": pyarrow.bool_(), ".tool_calls": calls}
    keys = sorted((key for key in kinds if key.startswith(".")), key=lambda key: (key not in _FIRST_KEYS, key))
    turn = pyarrow.struct([(key[1:], types.get(key, text)) for key in keys])
    columns = {"bool": pyarrow.bool_(), "number": pyarrow.float64(), "pairs": pyarrow.list_(pyarrow.list_(text))}
    return (columns | {"turn": turn, "turns": pyarrow.list_(turn)}).get(_column_kind(kinds), text)


def _to_cell(value: Any, kinds: set[str]) -> Any:
    """Return a value as its column holds it: arguments of tool calls, and what no plain type fits, are JSON text."""
    kind = _column_kind(kinds)
    if kind == "json":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if kind != "turns":
        return value
    with_calls = ((turn, [_call_cell(call) for call in turn.get("tool_calls") or []]) for turn in value)
    return [turn | {"tool_calls": calls} if calls else turn for turn, calls in with_calls]


def _call_cell(call: Row) -> Row:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return call | {"function": call["function"] | {"arguments": text}}
