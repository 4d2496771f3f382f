"""Containers: one reader a kind of file, from a path to raw rows with their file and line.

JSON, JSON-lines, CSV, TSV, Parquet, Arrow, YAML and text, packed or not, and folders of them. What a row means is for
`align.data.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from align.data.containers.arrow_files import DESCRIPTIONS, is_saved_dataset, read_arrow, read_parquet, read_saved
from align.data.containers.csv_files import read_csv, read_tsv
from align.data.containers.data_files import PACKED, DataFile, ReadOptions
from align.data.containers.folders import SplitRequest, choose_files
from align.data.containers.json_files import read_json, read_json_lines
from align.data.containers.text_files import read_text_file, read_yaml_file
from align.data.row_errors import RawRow
from align.errors import DataError, UsageError, nearest, shorten

_READERS: dict[str, Callable[[DataFile], Iterator[RawRow]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": read_text_file,
    ".yaml": read_yaml_file,
    ".yml": read_yaml_file,
}
_TABLES = (".csv", ".tsv")
_YAML = (".yaml", ".yml")
_BINARY = (".parquet", ".arrow", ".feather")


def read_path(path: Path, name: str, notes: list[str], options: ReadOptions | None = None) -> Iterator[RawRow]:
    """Yield the rows of a file or of every data file in a folder; decisions are appended to `notes`.

    Raises DataError for what is no readable file, or none that holds rows.
    """
    check_path(path, name)
    options = options or ReadOptions()
    if path.is_dir():
        yield from _read_folder(path, name, notes, options)
        return
    file = DataFile(path, name, notes, options)
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise DataError(f"{name}: files of this kind are not read; convert it to one of {', '.join(_READERS)}")
    _check_options(file)
    yield from reader(file)


def check_path(path: Path, name: str) -> None:
    """Raise DataError for what is not there or cannot be entered, with the names beside it that are like it."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{name}: a link to a file that is not there; fetch the file or remove the link") from None
        siblings = sorted(sibling.name for sibling in path.parent.glob("[!.]*"))
        hint = nearest(path.name, siblings) if siblings else " check the path"
        raise DataError(f"{name}: no such file;{hint}") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name that can be none
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{name}: cannot be read ({reason}); check the path and its permissions") from None


def _check_options(file: DataFile) -> None:
    """Refuse options that mean nothing for a file of this kind, rather than ignore them."""
    options = file.options
    if options.split or options.subset:
        raise UsageError(
            f"{file.name}: only a folder or a hub dataset has splits and subsets; name the file of the split"
        )
    meant = {
        "header": (bool(options.header), file.suffix in _TABLES),
        "quoting": (options.quoting != "auto", file.suffix in _TABLES),
        "rows_at": (options.rows_at is not None, file.suffix in (".json", *_YAML)),
        "encoding": (options.encoding != "auto", file.suffix not in _BINARY),
    }
    for setting, (is_given, has_meaning) in meant.items():
        if is_given and not has_meaning:
            raise UsageError(f"{file.name}: {setting} means nothing for a {file.suffix} file; take it out")


def _read_folder(folder: Path, name: str, notes: list[str], options: ReadOptions) -> Iterator[RawRow]:
    request = SplitRequest(name, options.split, options.subset)
    if is_saved_dataset(folder):
        yield from read_saved(folder, request, notes)
        return
    paths = sorted(path for path in folder.rglob("*") if _is_named_as_data(path) and not _is_hidden(path, folder))
    files = [path for path in paths if path.is_file()]
    irregular = ", ".join(path.relative_to(folder).as_posix() for path in paths if not path.is_file())
    # Beside data a YAML file describes it; alone it is the data.
    data = [file for file in files if file.name not in DESCRIPTIONS and file.suffix.lower() not in _YAML] or files
    if not data:
        reason = f" ({shorten(irregular)}: no regular file)" if irregular else ""
        raise DataError(f"{name}: a folder without data files{reason}; put one of {', '.join(_READERS)} there")
    if irregular:
        left_out = shorten(irregular, 200)
        notes.append(f"{name}: left out {left_out}: a pipe, a device or a link to nothing, no regular file")
    options = replace(options, split=None, subset=None)
    for file in choose_files(folder, data, request, notes):
        yield from read_path(file, f"{name.rstrip('/')}/{file.relative_to(folder).as_posix()}", notes, options)


def _is_named_as_data(path: Path) -> bool:
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in PACKED]
    return bool(suffixes) and suffixes[-1] in _READERS and not path.is_dir()


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
