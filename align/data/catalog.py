"""The catalogue: from a spec such as `NAME:limit=500` to a dataset, and from a dataset to its raw rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data import dataset_info
from align.data.containers import check_path, read_path
from align.data.containers.data_files import ReadOptions
from align.data.containers.json_files import find_rows_key
from align.data.dataset_config import (
    PARTS,
    SETTINGS,
    DatasetConfig,
    FileDataset,
    HubDataset,
    MixtureDataset,
    MixtureMember,
    SourceDataset,
    build_dataset,
)
from align.data.formats import recognise
from align.data.hub_rows import read_hub
from align.data.row_errors import RawRow
from align.errors import DataError, UsageError, nearest, shorten
from align.strict_yaml import load_yaml, read_yaml

SHIPPED = Path(__file__).resolve().parents[2] / "datasets_cfg"
_OPTION_GROUP = re.compile(r":(?=[a-z_]+=)")
_NEXT_OPTION = re.compile(r",(?=[a-z_]+=)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SETTINGS = {"subset", "split", "revision"}
_YAML_ONLY = {"mix", "columns", "tags", "label_map", "labels", "question", "header", "check"}
_DESCRIPTIVE = {"license", "language", "description"}
_OPTIONS = sorted(SETTINGS - _YAML_ONLY - _DESCRIPTIVE)
_COLUMN_OPTIONS = sorted(set(PARTS) - set(_OPTIONS))
"""Parts that a column can be named for behind a file's name, as in FILE:prompt=COLUMN."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One dataset a spec names: its name, its settings and the folder its source is looked up from."""

    name: str
    config: DatasetConfig
    folder: Path

    @property
    def scorer(self) -> str | None:
        """Return the name of the scorer its answers are scored by, if it has one."""
        return None if isinstance(self.config, MixtureDataset) else self.config.scorer

    @property
    def source_config(self) -> SourceDataset:
        """Return the settings of a dataset that is no mixture; UsageError for a mixture."""
        if isinstance(self.config, MixtureDataset):
            raise UsageError(f"{self.name}: is a mixture, which is not read in one pass; scan its members")
        return self.config


def catalogue() -> dict[str, Path]:
    """Return every dataset of the catalogue by name: those in ./datasets_cfg win over those of the project."""
    files = [*SHIPPED.glob("*.yaml"), *Path("datasets_cfg").glob("*.yaml")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def find_dataset(spec: str) -> Dataset:
    """Return the dataset of a spec: NAME, a file, a folder or hf://owner/name, then options such as `:limit=500`."""
    target, *groups = _OPTION_GROUP.split(spec)
    options = [option for group in groups for option in _NEXT_OPTION.split(group)]
    try:
        dataset = _find_target(target)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(
            f"{shorten(target, 300)}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    if options:
        values = _parse_options(spec, options)
        given = dataset.config.model_dump(exclude_unset=True, exclude=_HUB_SETTINGS if "source" in values else None)
        if "columns" in values:
            values["columns"] = given.get("columns", {}) | values["columns"]
        name = ":".join(part.rsplit("/", 1)[-1] for part in (target, *options))
        dataset = Dataset(name, build_dataset(given | values), dataset.folder)
    if isinstance(dataset.config, FileDataset) and dataset.config.source.endswith(dataset_info.FILE_NAME):
        return _open_dataset_info(dataset, dataset.config)
    return dataset


def _parse_options(spec: str, options: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, _, text in (option.partition("=") for option in options):
        if key in _COLUMN_OPTIONS:
            values.setdefault("columns", {})[key] = text
        elif key in _OPTIONS:
            values[key] = text
        else:
            raise UsageError(f"{spec}: unknown option {key!r};{nearest(key, [*_OPTIONS, *_COLUMN_OPTIONS])}")
    return values


def read_entry(name: str, path: Path) -> Dataset:
    """Return the dataset a YAML of the catalogue describes; UsageError names the file."""
    return Dataset(name, _build_from(path, read_yaml(path)), path.parent)


def _build_from(path: Path, values: dict[str, Any]) -> DatasetConfig:
    try:
        return build_dataset(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _find_target(target: str) -> Dataset:
    path = Path(target)
    if target.startswith("hf://"):
        return Dataset(target.removeprefix("hf://"), build_dataset({"source": target}), Path())
    if path.suffix in (".yaml", ".yml"):
        recipe = _read_recipe(path)
        if recipe is None:
            return Dataset(path.name, build_dataset({"source": target}), Path())
        return Dataset(path.stem, _build_from(path, recipe), path.parent)
    entries = catalogue()
    if target in entries:
        return read_entry(target, entries[target])
    if _HUB_ID.fullmatch(target) and not path.parent.exists():
        raise DataError(f"{target}: no such file or folder; a hub dataset is written hf://{target}")
    if path.exists() or "/" in target or "." in target:
        return Dataset(path.name or target, build_dataset({"source": target}), Path())
    raise DataError(
        f"{target}: no dataset of this name and no such file;{nearest(target, entries)} "
        "`align data list` shows all; a hub dataset is written hf://owner/name"
    )


def _read_recipe(path: Path) -> dict[str, Any] | None:
    """Return the settings in a dataset YAML; None for a YAML file of rows, DataError for one that is neither."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file; name the file itself")
    content = load_yaml(path.read_text(encoding="utf-8-sig", errors="replace"), str(path)) if path.is_file() else None
    if content is None:
        return read_yaml(path)
    if isinstance(content, dict) and (content.keys() & {"source", "format", "mix"} or content.keys() <= SETTINGS):
        return read_yaml(path)
    if isinstance(content, list) or (
        isinstance(content, dict) and (find_rows_key(content) is not None or recognise(content))
    ):
        return None
    listed = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else f"a {type(content).__name__}"
    raise DataError(
        f"{path}: a YAML file describes a dataset (source:, format: ...) or is a list of rows; this one has {listed}; "
        "name the data file under source: in another YAML, with rows_at: for the key that holds its rows"
    )


def _open_dataset_info(dataset: Dataset, config: FileDataset) -> Dataset:
    path = dataset.folder / config.source
    path = path if path.is_file() else Path(config.source)
    values = dataset_info.read_entry_of(path, config.source, config.entry)
    own = config.model_dump(exclude_unset=True, exclude={"source", "entry"})
    return Dataset(config.entry or "", build_dataset(values | own), path.parent)


def member_spec(member: MixtureMember, folder: Path) -> str:
    """Return the spec of a mixture's member: a file is looked up beside the YAML first, as a source is."""
    target = _OPTION_GROUP.split(member.name)[0]
    beside = folder / target
    return str(folder / member.name) if target not in catalogue() and beside.exists() else member.name


def source_datasets(dataset: Dataset, above: tuple[tuple[Path, str], ...] = ()) -> Iterator[Dataset]:
    """Yield every dataset with rows that a dataset is made of; UsageError for a mixture that holds itself."""
    if not isinstance(dataset.config, MixtureDataset):
        yield dataset
        return
    name = _OPTION_GROUP.split(dataset.name)[0]
    here = (dataset.folder.resolve(), name)
    if here in above:
        circle = " > ".join([*(one for _, one in above[above.index(here) :]), name])
        raise UsageError(f"{name}: the mixture holds itself ({circle}); take it out of one of them")
    for member in dataset.config.mix:
        try:
            part = find_dataset(member_spec(member, dataset.folder))
        except (DataError, UsageError) as error:
            raise type(error)(f"{dataset.name}: member {error}") from None
        yield from source_datasets(part, (*above, here))


def open_source(dataset: Dataset, roots: Mapping[str, Path], notes: list[str]) -> Iterator[RawRow]:
    """Return the raw rows of a dataset; decisions about its files are appended to `notes`."""
    config = dataset.source_config
    if isinstance(config, HubDataset):
        return read_hub(config)
    try:
        path = _locate(dataset, roots)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(f"{dataset.name}: cannot be read ({error.strerror}); check the path") from None
    shown = config.source if path == Path(config.source) else path.name
    options = ReadOptions(
        config.encoding,
        tuple(config.header),
        config.quoting,
        config.rows_at,
        config.split,
        config.subset,
        appended=config.format == "votes",
    )
    return read_path(path, shown, notes, options)


def check_source(dataset: Dataset) -> None:
    """Raise DataError when the file or folder of a dataset is not there; sources with `://` are not looked up."""
    source = dataset.source_config.source
    if "://" not in source:
        check_path(_locate(dataset, {}), source)


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
