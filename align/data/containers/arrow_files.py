"""Parquet and Arrow files, and the folders that `datasets.save_to_disk` writes, batch by batch.

Arrow gives every struct of a column the union of all their fields and fills it with nulls. Such a null was
not written by the row's author, so it is left out; nulls of whole columns and items of lists stay.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.containers.data_files import DataFile
from align.data.containers.folders import ALL, SAVED, choose_split
from align.data.row_errors import RawRow, RowError
from align.errors import DataError, shorten

if TYPE_CHECKING:
    import pyarrow

_BATCH = 1000
_STATE, _DICT = SAVED
_MAX_DESCRIPTION_BYTES = 16 << 20
_MAX_DEPTH = 100

Repair = Callable[[Any], Any]


def read_parquet(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file."""
    import pyarrow.parquet

    with file.unchanged(), _explain_errors(file.name, "Parquet"):
        batches = pyarrow.parquet.ParquetFile(file.path).iter_batches(batch_size=_BATCH)
        yield from _number_rows(file.name, batches)


def read_arrow(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file, in either of its two forms (file or stream)."""
    with file.unchanged(), _explain_errors(file.name, "Arrow"):
        yield from _number_rows(file.name, _arrow_batches(file.path))


def read_saved(folder: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a folder that `save_to_disk` wrote; of a DatasetDict those of one split."""
    if (folder.path / _STATE).is_file():
        if folder.split not in (None, ALL):
            raise DataError(f"{folder.name}: one dataset without splits; take :split={folder.split} out")
        yield from _read_saved_split(folder.path, folder.name)
        return
    names = _read_description(folder.path / _DICT, folder.name).get("splits")
    splits = {split: [folder.path / split] for split in names or ()} if _are_file_names(names) else {}
    if not splits:
        raise DataError(f"{folder.name}: its {_DICT} lists no splits; save the dataset again")
    for part in choose_split(splits, (), folder):
        yield from _read_saved_split(part, f"{folder.name.rstrip('/')}/{part.name}")


def _read_saved_split(folder: Path, name: str) -> Iterator[RawRow]:
    state = _read_description(folder / _STATE, name)
    with _explain_errors(name, "Arrow"):
        keys = ("_data_files", "_indices_files", "_indices_data_files")
        shards, *parts = ([folder / file for file in _listed_files(state, key, name)] for key in keys)
        batches: Iterator[pyarrow.RecordBatch] = chain.from_iterable(map(_arrow_batches, shards))
        if indices := [*chain(*parts)]:
            batches = _pick_rows(list(batches), indices, name)
        yield from _number_rows(name, batches)


def _are_file_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)


def _read_description(path: Path, name: str) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            description = json.loads(stream.read(_MAX_DESCRIPTION_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({shorten(str(error))})"
        raise DataError(f"{name}: its {path.name} {problem}; save the dataset again") from None
    return description if isinstance(description, dict) else {}


def _listed_files(state: dict[str, Any], key: str, name: str) -> list[str]:
    """Return the names of the files that a state lists, each of them a file of the same folder."""
    listed = state.get(key) or []
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    if not _are_file_names(names) or (key == "_data_files" and not names):
        raise DataError(f"{name}: its {_STATE} lists no data files of this folder; save the dataset again")
    return [str(name) for name in names]


@contextmanager
def _explain_errors(name: str, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{name}: {Path(str(error.filename)).name} is missing; save the dataset again") from None
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, RecursionError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: no readable {kind} ({shorten(reason, 80)}); fetch the file again") from None


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yield the batches of an Arrow file, mapped into memory and not loaded."""
    import pyarrow

    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if not path.stat().st_size:
        raise ValueError("the file is empty")
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            batch.validate(full=True)  # offsets that lie would be followed into other memory
            yield batch


def _pick_rows(batches: list[pyarrow.RecordBatch], files: list[Path], name: str) -> Iterator[pyarrow.RecordBatch]:
    """Yield a batch for each row that the indices of a shuffled or filtered dataset name, in their order."""
    starts = [0, *accumulate(batch.num_rows for batch in batches)]
    for part in chain.from_iterable(map(_arrow_batches, files)):
        for row in part.column(0).to_pylist():
            if not isinstance(row, int) or not 0 <= row < starts[-1]:
                raise DataError(f"{name}: its indices name row {row} of {starts[-1]}; save it again")
            index = bisect_right(starts, row) - 1
            yield batches[index].slice(row - starts[index], 1)


def _number_rows(name: str, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[RawRow]:
    numbers = count(1)
    repair: Repair | None = None
    schema = None
    for batch in batches:
        if batch.schema is not schema:
            schema, repair = batch.schema, repair_of_columns(batch.schema)
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(start, _BATCH).to_pylist():
                yield RawRow(name, next(numbers), repair(row) if repair else row)


def repair_of_columns(schema: pyarrow.Schema, *, json_text: bool = True) -> Repair | None:
    """Return a function that makes plain rows of a table's rows; None when they are plain as they are.

    `json_text`: columns of type JSON hold text, not yet values.
    """
    read_json = _read_json if json_text else None
    repairs = {field.name: repair for field in schema if (repair := _repair_of(field.type, 0, read_json))}
    if not repairs:
        return None

    def repaired(row: dict[str, Any]) -> Any:
        try:
            return {key: repairs[key](value) if key in repairs else value for key, value in row.items()}
        except ValueError as error:
            return RowError("invalid JSON", "row", f"holds broken JSON text ({shorten(str(error))})", "correct the row")

    return repaired


def _repair_of(kind: Any, depth: int, read_json: Repair | None) -> Repair | None:
    """Return a function that drops nulls of structs, makes objects of maps and reads JSON; None for other types."""
    import pyarrow.types as types

    if depth > _MAX_DEPTH:
        raise ValueError("its columns are nested too deeply")
    if getattr(kind, "extension_name", "") == "arrow.json":
        return read_json
    if types.is_map(kind):
        inner = _repair_of(kind.item_type, depth + 1, read_json) or _same
        return lambda pairs: None if pairs is None else {str(key): inner(value) for key, value in pairs}
    if types.is_struct(kind):
        inside = {field.name: _repair_of(field.type, depth + 1, read_json) or _same for field in kind}
        return lambda fields: (
            None if fields is None else {key: inside[key](value) for key, value in fields.items() if value is not None}
        )
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _repair_of(kind.value_type, depth + 1, read_json)
        return item and (lambda items: None if items is None else [item(value) for value in items])
    return None


def _same(value: Any) -> Any:
    return value


def _read_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
