"""Files to raw rows: JSON, JSON-lines, CSV, TSV, Parquet, YAML, text, packed or not, folders of them and hub datasets.

A row comes with its source and line. What the row means is for `readers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config import load_yaml
from align.data.containers.arrow_files import (
    DESCRIPTIONS,
    is_saved,
    read_arrow,
    read_parquet,
    read_saved,
    repair_of_columns,
)
from align.data.containers.csv_files import read_csv, read_tsv
from align.data.containers.data_files import PACKED, DataFile, ReadOptions
from align.data.containers.folders import SplitRequest, choose_files
from align.data.containers.json_files import RawRow, read_json, read_json_lines, rows_of_object
from align.errors import DataError, UsageError, nearest, shorten

__all__ = ["DataFile", "RawRow", "ReadOptions", "read_hub", "read_path"]

LONGEST_YAML = 64 << 20
"""Characters of a YAML file, which is held in memory whole and read slowly."""
LONGEST_TEXT = 16 << 20
"""A text file of more characters than this is cut at line ends, so that memory holds a part of it."""


def read_path(path: Path, name: str, notes: list[str], reading: ReadOptions | None = None) -> Iterator[RawRow]:
    """The rows of a file or of every data file in a folder; what had to be decided is appended to `notes`.

    Raises DataError for what is no readable file, or none that holds rows.
    """
    check_path(path, name)
    if path.is_dir():
        yield from _read_folder(path, name, notes, reading or ReadOptions())
        return
    file = DataFile(path, name, notes, reading or ReadOptions())
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise DataError(f"{name}: files of this kind are not read; convert it to one of {', '.join(_READERS)}")
    _check_reading(file)
    yield from reader(file)


def check_path(path: Path, name: str) -> None:
    """Raise DataError for what is not there or cannot be entered, with the names beside it that are like it."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{name}: a link to a file that is not there; fetch the file or remove the link") from None
        siblings = sorted(found.name for found in path.parent.glob("[!.]*"))
        hint = nearest(path.name, siblings) if siblings else " check the path"
        raise DataError(f"{name}: no such file;{hint}") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name that can be none
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{name}: cannot be read ({reason}); check the path and its permissions") from None


def _check_reading(file: DataFile) -> None:
    """Refuse settings that mean nothing for a file of this kind, rather than pass them over."""
    reading = file.reading
    if reading.split or reading.subset:
        raise UsageError(
            f"{file.name}: only a folder or a hub dataset has splits and subsets; name the file of the split"
        )
    meant = {
        "header": (bool(reading.header), _TABLES),
        "quoting": (reading.quoting != "auto", _TABLES),
        "rows_at": (reading.rows_at is not None, (".json", *_YAML)),
        "encoding": (reading.encoding != "auto", tuple(set(_READERS) - {".parquet", ".arrow", ".feather"})),
    }
    for setting, (given, suffixes) in meant.items():
        if given and file.suffix not in suffixes:
            raise UsageError(f"{file.name}: {setting} means nothing for a {file.suffix} file; take it out")


def read_hub(name: str, subset: str | None, split: str | None, revision: str | None = None) -> Iterator[RawRow]:
    """The rows of a dataset on the Hugging Face hub, or of one file in it (`owner/name/path`), cached or fetched."""
    if name.count("/") > 1:
        yield from read_path(_fetch_hub_file(name, revision), f"hf://{name}", [])
        return
    from datasets import load_dataset

    place = f"hf://{name}"
    try:
        rows = load_dataset(name, subset, split=split or "train", revision=revision)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{place}: the dataset cannot be read ({shorten(reason, 120)}); check name, subset and split, "
            "and the network unless it is in the local cache"
        ) from None
    repair = repair_of_columns(rows.features.arrow_schema, json_text=False)
    for number, row in enumerate(rows, start=1):
        yield RawRow(place, number, repair(row) if repair else row)


def _fetch_hub_file(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    owner, repository, path = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", path, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hf://{name}: the file cannot be fetched ({shorten(reason, 120)}); check its name and the revision, "
            "and the network unless it is in the local cache"
        ) from None


def _read_folder(folder: Path, name: str, notes: list[str], reading: ReadOptions) -> Iterator[RawRow]:
    wanted = SplitRequest(name, reading.split, reading.subset)
    if is_saved(folder):
        yield from read_saved(folder, wanted, notes)
        return
    named = sorted(found for found in folder.rglob("*") if _is_data(found) and not _hidden(found, folder))
    held = [found for found in named if found.is_file()]
    odd = ", ".join(found.relative_to(folder).as_posix() for found in named if not found.is_file())
    # Beside data a YAML file describes it; alone it is the data.
    described = (file for file in held if file.name not in DESCRIPTIONS and file.suffix.lower() not in _YAML)
    files = list(described) or held
    if not files:
        what = f" ({shorten(odd)}: no regular file)" if odd else ""
        raise DataError(f"{name}: a folder without data files{what}; put one of {', '.join(_READERS)} there")
    if odd:
        notes.append(f"{name}: left out {shorten(odd, 200)}: a pipe, a device or a link to nothing, no regular file")
    inner = replace(reading, split=None, subset=None)
    for file in choose_files(folder, files, wanted, notes):
        yield from read_path(file, f"{name.rstrip('/')}/{file.relative_to(folder).as_posix()}", notes, inner)


def _is_data(path: Path) -> bool:
    """Whether a path has the name of a data file, be it a file or not."""
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in PACKED]
    return bool(suffixes) and suffixes[-1] in _READERS and not path.is_dir()


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read_yaml(file: DataFile) -> Iterator[RawRow]:
    try:
        whole = load_yaml(_bounded_text(file), file.name)
    except UsageError as error:
        raise DataError(str(error)) from None
    except RecursionError:
        raise DataError(f"{file.name}: nested too deeply to be read; flatten it") from None
    whole = _plain(whole, file, set())
    if isinstance(whole, dict):
        yield from rows_of_object(whole, file)
    elif isinstance(whole, list):
        file.note("a YAML list; rows are numbered in place of lines")
        yield from (RawRow(file.name, number, value) for number, value in enumerate(whole, start=1))
    elif whole is not None:
        raise DataError(f"{file.name}: holds {shorten(whole)}, not rows; give a list of rows")


def _bounded_text(file: DataFile) -> str:
    lines: list[str] = []
    size = 0
    for line in file.decoded_lines():
        lines.append(line)
        size += len(line)
        if size > LONGEST_YAML:
            raise DataError(
                f"{file.name}: a YAML file of more than {LONGEST_YAML >> 20}M characters; convert it to JSON"
            )
    return "".join(lines)


def _plain(value: Any, file: DataFile, seen: set[int]) -> Any:
    """A YAML value with text as keys, as JSON has them; one that is repeated by an alias could unfold without end."""
    if not isinstance(value, (dict, list)):
        return value
    if id(value) in seen:
        raise DataError(f"{file.name}: repeats a value by an alias (*name); write it out")
    seen.add(id(value))
    if isinstance(value, list):
        return [_plain(item, file, seen) for item in value]
    return {str(key): _plain(item, file, seen) for key, item in value.items()}


def _read_document(file: DataFile) -> Iterator[RawRow]:
    """A text file as one text, or as several when it is too long for one."""
    lines: list[str] = []
    size, start = 0, 1
    for number, line in enumerate(file.decoded_lines(), start=1):
        line = line.replace("\r\n", "\n")
        if size + len(line) > LONGEST_TEXT and lines:
            file.note(f"a long text; it was cut at line ends into texts of at most {LONGEST_TEXT >> 20}M characters")
            yield RawRow(file.name, start, {"text": "".join(lines)})
            lines, size, start = [], 0, number
        lines.append(line)
        size += len(line)
    if lines:
        yield RawRow(file.name, start, {"text": "".join(lines)})


_TABLES = (".csv", ".tsv")
_YAML = (".yaml", ".yml")
_READERS: dict[str, Callable[[DataFile], Iterator[RawRow]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": _read_document,
    **dict.fromkeys(_YAML, _read_yaml),
}
