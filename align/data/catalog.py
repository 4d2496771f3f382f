"""The catalogue: from a spec such as `NAME:limit=500` to a dataset, whose settings are in a YAML or in the spec.

A dataset is a file or folder, a hub dataset, votes, or a mixture, each with its own fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from align.config import Settings, build
from align.data import dataset_info
from align.data.containers.json_files import find_rows_key
from align.data.formats import FORMATS, recognise
from align.data.formats.row_layout import RowLayout
from align.data.formats.turns import CALL, Tags
from align.data.vote_filter import VoteFilter
from align.errors import DataError, UsageError, nearest, shorten
from align.schema import View
from align.strict_yaml import load_yaml, read_yaml

SHIPPED = Path(__file__).resolve().parents[2] / "datasets_cfg"
PARTS = sorted({part for row_format in FORMATS.values() for part in row_format.columns})
"""Every part that a column can play in some format."""
HUB = "hf://"
_TAG_KEYS = ("role", "content", "system", "user", "assistant", "tool", CALL)
_OPTION_GROUP = re.compile(r":(?=[a-z_]+=)")
_NEXT_OPTION = re.compile(r",(?=[a-z_]+=)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ReaderExample(Settings):
    """One raw row and the record (or records) a test expects of it."""

    row: dict[str, Any]
    """a row in the dataset's own shape"""
    record: dict[str, Any] | list[dict[str, Any]]
    """the fields of the record that are not empty"""


class MixtureMember(Settings):
    """One dataset of a mixture."""

    name: str
    """a dataset by name, file or hub id, with options such as :limit=500; files are looked up from the YAML's folder"""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """its share of the mixed rows, relative to the other members' weights"""


class _AnyDataset(Settings):
    """The settings of every dataset."""

    kind: ClassVar[str]
    """the dataset's kind, for messages"""

    limit: int | None = Field(None, ge=1)
    """take this many records: the first, or a sample when there is a seed"""
    seed: int | None = Field(None, ge=0)
    """shuffle the records"""
    license: str = ""
    """under which terms the data may be used"""
    language: str | list[str] = ""
    """what it is written in"""
    description: str = ""
    """what it is, in a sentence"""


class MixtureDataset(_AnyDataset):
    """Several datasets, interleaved."""

    kind: ClassVar[str] = "a mixture"

    mix: list[MixtureMember] = Field(min_length=1)
    """datasets to interleave, in place of a source"""
    rows: int | None = Field(None, ge=1)
    """rows of a mixture; by default as many as stopping allows"""
    stopping: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """a mixture ends before the first member would run out, or repeats members until every row of all was given"""

    @field_validator("mix")
    @classmethod
    def _check_names(cls, members: list[MixtureMember]) -> list[MixtureMember]:
        names = [member.name for member in members]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"mix: {twice} is listed twice; list it once with the sum of the weights")
        return members


class _SourceDataset(_AnyDataset):
    """The settings of every dataset with rows of its own."""

    source: str = Field(min_length=1)
    """a file or folder (looked up from the YAML's folder, then from here), hf://owner/name, hf://owner/name/file or registry://"""
    format: str = "auto"
    """how rows are laid out; auto decides by the first rows and notes the decision"""
    columns: dict[str, str | list[str]] = Field(default_factory=dict)
    """which column plays which part, where it is not called as usual"""
    tags: dict[str, str] = Field(default_factory=dict)
    """how conversations spell role, content and the roles system, user, assistant, tool and tool_call"""
    label_map: dict[str, bool | Literal["a", "b", "tie"]] = Field(default_factory=dict)
    """which verdict of a pair means a, b or tie; or which label of an answer means true (good) or false"""
    labels: dict[str, str] = Field(default_factory=dict)
    """format labels: what each class is called in an answer, by the value of its column"""
    question: str = ""
    """format labels: what is asked about the text, written before it"""
    default_system: str = ""
    """system turn of the conversations without one of their own; a persona, for example"""
    ties: Literal["drop", "both", "half"] = "drop"
    """pairs without a winner: left out and counted, kept in both orders, or in one of them that a coin decides"""
    subset: str | None = None
    """configuration of a hub dataset, or of a folder whose README.md lists several"""
    split: str | None = None
    """split of a hub dataset or a folder; train by default, all for every one of a folder"""
    part: Literal["train", "test"] | None = None
    """take one side of a split by the content of the prompts; rows that share a prompt are on the same side"""
    test_share: float = Field(0.1, gt=0, lt=1)
    """how much of the prompts is on the test side"""
    scorer: str | None = Field(None, pattern="^[a-z][a-z0-9_]*$")
    """how `align.evaluate` scores answers to it; looked up there by name"""
    check: ReaderExample | None = None
    """an example, run by a test"""

    @field_validator("format")
    @classmethod
    def _check_format(cls, name: str) -> str:
        if name != "auto" and name not in FORMATS:
            raise ValueError(f"unknown format {name!r};{nearest(name, ['auto', *FORMATS])}")
        return name

    @field_validator("label_map", "labels", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        """YAML reads a bare yes as true, so a boolean key stands for both spellings."""
        if not isinstance(value, dict):
            return value
        spellings = {"True": ("true", "yes"), "False": ("false", "no")}
        names = {key: spellings[str(key)] if isinstance(key, bool) else (str(key),) for key in value}
        return {name: meaning for key, meaning in value.items() for name in names[key]}

    def model_post_init(self, _context: Any) -> None:
        """Check the settings that depend on the format."""
        if self.format != "labels" and (self.labels or self.question):
            raise UsageError("labels and question: belong to format labels; write format: labels")
        parts = PARTS if self.format == "auto" else FORMATS[self.format].columns
        for part in self.columns:
            if part not in parts:
                raise UsageError(f"columns: no part {part!r} in format {self.format};{nearest(part, parts)}")
        for tag in self.tags:
            if tag not in _TAG_KEYS:
                raise UsageError(f"tags: no tag {tag!r};{nearest(tag, _TAG_KEYS)}")

    def row_layout(self, format_name: str, view: View | None) -> RowLayout:
        """Return the layout of the rows, once their format is known; UsageError for a setting it has no use for."""
        if self.default_system and format_name == "text":
            raise UsageError("default_system: belongs to conversations, and these rows are raw text; take it out")
        row_format, given = FORMATS[format_name], self.tags
        usual = row_format.tags
        roles = {spelling: role for spelling, role in usual.roles.items() if role not in given}
        roles |= {given[role]: role for role in _TAG_KEYS[2:] if role in given}
        tags = Tags(given.get("role", usual.role), given.get("content", usual.content), roles)
        policies = (self.label_map, self.ties, self.labels, self.question)
        return RowLayout(row_format.columns, self.columns, tags, view, *policies, default_system=self.default_system)


class FileDataset(_SourceDataset):
    """A file, or a folder of files."""

    kind: ClassVar[str] = "a file or folder"

    encoding: str = "auto"
    """how text files are encoded; auto is UTF-8, with or without a BOM, and refuses anything else"""
    header: list[str] = Field(default_factory=list)
    """the columns of a CSV or TSV file that does not name them in its first line"""
    quoting: Literal["auto", "none", "csv"] = "auto"
    """whether quotes in a table are characters or hold cells together; auto is csv, and for TSV what fits more rows"""
    rows_at: str | None = None
    """the key, or dotted path of keys, under which a JSON or YAML file holds its rows"""
    entry: str | None = None
    """the dataset to take of a dataset_info.json"""


class HubDataset(_SourceDataset):
    """A dataset on the Hugging Face hub, or one file of it."""

    kind: ClassVar[str] = "a hub dataset"

    revision: str | None = None
    """commit, tag or branch of a hub dataset; pins it"""


class VoteDataset(VoteFilter, FileDataset):
    """Votes of the comparison page, or some of them."""

    kind: ClassVar[str] = "votes"

    truncated: Literal["drop", "keep"] = "drop"
    """votes on answers that were stopped before their end: left out and counted, or kept"""
    both_bad: Literal["unpaired", "drop"] = "unpaired"
    """votes for neither: both answers are bad examples where a stage takes answers one by one (KTO), or left out"""

    def row_layout(self, format_name: str, view: View | None) -> RowLayout:
        """Return the layout of the rows, with the policies for votes."""
        layout = super().row_layout(format_name, view)
        return replace(layout, truncated=self.truncated, both_bad=self.both_bad)


SourceDataset = FileDataset | HubDataset | VoteDataset
DatasetConfig = SourceDataset | MixtureDataset
DATASET_KINDS: tuple[type[DatasetConfig], ...] = (FileDataset, HubDataset, VoteDataset, MixtureDataset)
SETTINGS = {key for kind in DATASET_KINDS for key in kind.model_fields}
"""Every setting that some kind of dataset has."""
_ONLY_OF_VOTES = VoteDataset.model_fields.keys() - FileDataset.model_fields.keys()
_HUB_SETTINGS = {"subset", "split", "revision"}
_YAML_ONLY = {"mix", "columns", "tags", "label_map", "labels", "question", "header", "check"}
_DESCRIPTIVE = {"license", "language", "description"}
_OPTIONS = sorted(SETTINGS - _YAML_ONLY - _DESCRIPTIVE)
_COLUMN_OPTIONS = sorted(set(PARTS) - set(_OPTIONS))
"""Parts that a column can be named for behind a file's name, as in FILE:prompt=COLUMN."""


def build_dataset(values: dict[str, Any]) -> DatasetConfig:
    """Return the settings as the kind of dataset they describe; UsageError names each wrong one."""
    if values.keys() <= SETTINGS and bool(values.get("source")) == bool(values.get("mix")):
        problem = "it has both" if values.get("mix") else "missing"
        raise UsageError(f"source: {problem}; give source: FILE or mix: [{{name: ..., weight: ...}}], one of them")
    kind = _choose_kind(values)
    foreign = sorted(key for key in SETTINGS & values.keys() if key not in kind.model_fields)
    if foreign and kind is MixtureDataset:
        raise UsageError(f"{', '.join(foreign)}: not for a mixture, which has {', '.join(sorted(kind.model_fields))}")
    if MixtureDataset.model_fields.keys() & set(foreign):
        raise UsageError("rows and stopping: belong to a mixture; write limit: to take a part of a dataset")
    if foreign:
        owner = next(other.kind for other in DATASET_KINDS if foreign[0] in other.model_fields)
        raise UsageError(f"{foreign[0]}: a setting of {owner}, and {values['source']} is {kind.kind}; take it out")
    return build(kind, values)


def _choose_kind(values: dict[str, Any]) -> type[DatasetConfig]:
    if values.get("mix"):
        return MixtureDataset
    if str(values.get("source")).startswith(HUB):
        return HubDataset
    is_votes = values.get("format") == "votes" or _ONLY_OF_VOTES & values.keys()
    return VoteDataset if is_votes else FileDataset


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


def read_entry(name: str, path: Path, values: dict[str, Any] | None = None) -> Dataset:
    """Return the dataset a YAML describes, of which the values may be read already; UsageError names the file."""
    values = read_yaml(path) if values is None else values
    try:
        return Dataset(name, build_dataset(values), path.parent)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _find_target(target: str) -> Dataset:
    path = Path(target)
    if target.startswith(HUB):
        name = target.removeprefix(HUB)
    elif path.suffix in (".yaml", ".yml"):
        if (recipe := _read_recipe(path)) is not None:
            return read_entry(path.stem, path, recipe)
        name = path.name
    elif target in (entries := catalogue()):
        return read_entry(target, entries[target])
    elif _HUB_ID.fullmatch(target) and not path.parent.exists():
        raise DataError(f"{target}: no such file or folder; a hub dataset is written hf://{target}")
    elif path.exists() or "/" in target or "." in target:
        name = path.name or target
    else:
        raise DataError(
            f"{target}: no dataset of this name and no such file;{nearest(target, entries)} "
            "`align data list` shows all; a hub dataset is written hf://owner/name"
        )
    return Dataset(name, build_dataset({"source": target}), Path())


def _read_recipe(path: Path) -> dict[str, Any] | None:
    """Return the settings in a dataset YAML; None for a YAML file of rows, DataError for one that is neither."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file; name the file itself")
    content = load_yaml(path.read_text(encoding="utf-8-sig", errors="replace"), str(path)) if path.is_file() else None
    if isinstance(content, list):
        return None
    if content is None:
        return read_yaml(path)
    if isinstance(content, dict):
        if content.keys() & {"source", "format", "mix"} or content.keys() <= SETTINGS:
            return read_yaml(path)
        if find_rows_key(content) is not None or recognise(content):
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


def find_members(mixture: Dataset, config: MixtureDataset) -> Iterator[tuple[str, Dataset]]:
    """Yield name and dataset of each member; a file is looked up beside the YAML first, as a source is."""
    for member in config.mix:
        target = _OPTION_GROUP.split(member.name)[0]
        is_beside = target not in catalogue() and (mixture.folder / target).exists()
        try:
            dataset = find_dataset(str(mixture.folder / member.name) if is_beside else member.name)
        except (DataError, UsageError) as error:
            raise type(error)(f"{mixture.name}: member {error}") from None
        yield member.name, dataset


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
    for _, member in find_members(dataset, dataset.config):
        yield from source_datasets(member, (*above, here))
