"""Sources: from a dataset, or the path of a file or folder, to raw rows with their file and line.

JSON, JSON-lines, CSV, TSV, Parquet, Arrow, YAML and text, packed or not, folders of them, and the hub. How a kind of
file is read is for `containers/`, what a row means for `formats/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from align.data.catalog import HUB, Dataset, HubDataset, find_dataset, source_datasets
from align.data.containers.arrow_files import read_arrow, read_parquet, read_saved, repair_of_columns
from align.data.containers.data_files import DataFile, suffix_of
from align.data.containers.folders import DESCRIPTIONS, SAVED, choose_files
from align.data.containers.json_files import read_json, read_json_lines, read_yaml_file
from align.data.containers.text_files import read_csv, read_text_file, read_tsv
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
_YAML = (".yaml", ".yml")
_MEANT_FOR = {
    "header": {".csv", ".tsv"},
    "quoting": {".csv", ".tsv"},
    "rows_at": {".json", *_YAML},
    "encoding": _READERS.keys() - {".parquet", ".arrow", ".feather"},
}
"""The kinds of file for which a setting means something."""


def open_source(dataset: Dataset, roots: Mapping[str, Path], notes: list[str]) -> Iterator[RawRow]:
    """Return the raw rows of a dataset; decisions about its files are appended to `notes`."""
    config = dataset.source_config
    if isinstance(config, HubDataset):
        return _read_hub(config)
    try:
        path = _locate(dataset, roots)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(f"{dataset.name}: cannot be read ({error.strerror}); check the path") from None
    shown = config.source if path == Path(config.source) else path.name
    settings = config.model_dump(include={"encoding", "header", "quoting", "rows_at", "split", "subset"})
    return read_path(DataFile(path, shown, notes, **settings, appended=config.format == "votes"))


def require_files(specs: list[str]) -> None:
    """Raise DataError when a file or folder is named that is not there; sources with `://` are not looked up."""
    for spec in specs:
        for dataset in source_datasets(find_dataset(spec)):
            source = dataset.source_config.source
            if "://" not in source:
                _check_path(_locate(dataset, {}), source)


def _locate(dataset: Dataset, roots: Mapping[str, Path]) -> Path:
    source = dataset.source_config.source
    scheme, separator, rest = source.partition("://")
    if not separator:
        beside = dataset.folder / source
        return beside if beside.exists() else Path(source).expanduser()
    if scheme not in roots:
        raise DataError(f"{dataset.name}: its source {source} needs a {scheme}; give --{scheme} DIR")
    path = roots[scheme] / rest
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        remedy = "vote on the comparison page first" if dataset.name == "votes" else "run `align quickstart`"
        raise DataError(f"{dataset.name}: nothing is at {source} yet; {remedy}")
    return path


def read_path(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a file or of every data file in a folder; decisions are noted.

    Raises DataError for what is no readable file, or none that holds rows.
    """
    _check_path(file.path, file.name)
    if file.path.is_dir():
        yield from _read_folder(file)
        return
    suffix = suffix_of(file.path)
    if suffix not in _READERS:
        raise DataError(f"{file.name}: files of this kind are not read; convert it to one of {', '.join(_READERS)}")
    if file.split or file.subset:
        problem = "only a folder or a hub dataset has splits and subsets"
        raise UsageError(f"{file.name}: {problem}; name the file of the split")
    for setting, suffixes in _MEANT_FOR.items():
        if suffix not in suffixes and getattr(file, setting) not in ("auto", None, []):
            raise UsageError(f"{file.name}: {setting} means nothing for a {suffix} file; take it out")
    yield from _READERS[suffix](file)


def _check_path(path: Path, name: str) -> None:
    """Raise DataError for what is not there or cannot be entered, with the names beside it that are like it."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{name}: a link to a file that is not there; fetch the file or remove the link") from None
        siblings = sorted(sibling.name for sibling in path.parent.glob("[!.]*"))
        hint = nearest(path.name, siblings) or " check the path"
        raise DataError(f"{name}: no such file;{hint}") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name that can be none
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{name}: cannot be read ({reason}); check the path and its permissions") from None


def _read_folder(folder: DataFile) -> Iterator[RawRow]:
    if any((folder.path / name).is_file() for name in SAVED):
        yield from read_saved(folder)
        return
    names = {path: path.relative_to(folder.path).as_posix() for path in sorted(folder.path.rglob("*"))}
    named = [path for path, name in names.items() if suffix_of(path) in _READERS and "/." not in f"/{name}"]
    files = [path for path in named if path.is_file()]
    irregular = ", ".join(names[path] for path in named if not path.is_file() and not path.is_dir())
    # Beside data a YAML file describes it; alone it is the data.
    data = [file for file in files if file.name not in DESCRIPTIONS and file.suffix.lower() not in _YAML] or files
    if not data:
        reason = f" ({shorten(irregular)}: no regular file)" if irregular else ""
        raise DataError(f"{folder.name}: a folder without data files{reason}; put one of {', '.join(_READERS)} there")
    if irregular:
        folder.note(f"left out {shorten(irregular, 200)}: a pipe, a device or a link to nothing, no regular file")
    for file in choose_files(folder, data):
        name = f"{folder.name.rstrip('/')}/{names[file]}"
        yield from read_path(replace(folder, path=file, name=name, split=None, subset=None))


def _read_hub(config: HubDataset) -> Iterator[RawRow]:
    """Yield the rows of a hub dataset, or of one file in it (`owner/name/path`), cached or fetched."""
    name = config.source.removeprefix(HUB)
    is_file = name.count("/") > 1
    try:
        if is_file:
            from huggingface_hub import hf_hub_download

            owner, repository, path = name.split("/", 2)
            file = hf_hub_download(f"{owner}/{repository}", path, repo_type="dataset", revision=config.revision)
        else:
            from datasets import load_dataset

            rows = load_dataset(name, config.subset, split=config.split or "train", revision=config.revision)
    except (OSError, ValueError) as error:
        reason = shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 120)
        problem = f"the {'file cannot be fetched' if is_file else 'dataset cannot be read'} ({reason})"
        remedy = f"check {'its name and the revision' if is_file else 'name, subset and split'}, and the network"
        raise DataError(f"{config.source}: {problem}; {remedy} unless it is in the local cache") from None
    if is_file:
        yield from read_path(DataFile(Path(file), config.source))
        return
    repair = repair_of_columns(rows.features.arrow_schema, json_text=False)
    for number, row in enumerate(rows, start=1):
        yield RawRow(config.source, number, repair(row) if repair else row)
