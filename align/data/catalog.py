"""The catalogue: `datasets_cfg/NAME.yaml` files, LLaMA-Factory's `dataset_info.json`, and the specs that name data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from align.config import Settings, build, load_yaml, read_yaml
from align.data.containers.json_files import rows_key
from align.data.formats import FORMATS
from align.data.formats.detection import recognise
from align.data.formats.row_layout import RowLayout
from align.data.formats.turns import CALL, Tags
from align.data.vote_filter import VoteFilter
from align.errors import DataError, UsageError, nearest, shorten
from align.schema import View

SHIPPED = Path(__file__).resolve().parents[2] / "datasets_cfg"
_INFO = "dataset_info.json"
OPTION = re.compile(r":(?=[a-z_]+=)")
_NEXT_OPTION = re.compile(r",(?=[a-z_]+=)")
_OF_THE_HUB = {"subset", "split", "revision"}
_ELSEWHERE = ("source", "scorer")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TAG_KEYS = ("role", "content", "system", "user", "assistant", "tool", "tool_call")


class Check(Settings):
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


class DatasetConfig(Settings):
    """Where a dataset is and how its rows are laid out, or which datasets it mixes."""

    source: str = ""
    """a file or folder (looked up from the YAML's folder, then from here), hf://owner/name, hf://owner/name/file or registry://"""
    mix: list[MixtureMember] = Field(default_factory=list)
    """datasets to interleave, in place of a source"""
    rows: int | None = Field(None, ge=1)
    """rows of a mixture; by default as many as stopping allows"""
    stopping: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """a mixture ends before the first member would run out, or repeats members until every row of all was given"""
    format: str = "auto"
    """how rows are laid out; auto looks at the first rows and says what it decided"""
    columns: dict[str, str | list[str]] = Field(default_factory=dict)
    """which column plays which part, where it is not called as usual"""
    tags: dict[str, str] = Field(default_factory=dict)
    """how conversations spell role, content and the roles system, user, assistant, tool and tool_call"""
    label_map: dict[str, bool | Literal["a", "b", "tie"]] = Field(default_factory=dict)
    """which verdict of a pair means a, b or tie; or which label of an answer means true (good) or false"""
    labels: dict[str, str] = Field(default_factory=dict)
    """format labels: what each class is called in an answer, by what its column says"""
    question: str = ""
    """format labels: what is asked about the text, written before it"""
    ties: Literal["drop", "both", "half"] = "drop"
    """pairs without a winner: left out and counted, kept in both orders, or in one of them that a coin decides"""
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
    subset: str | None = None
    """configuration of a hub dataset, or of a folder whose README.md lists several"""
    revision: str | None = None
    """commit, tag or branch of a hub dataset; pins it"""
    split: str | None = None
    """split of a hub dataset or a folder; train by default, all for every one of a folder"""
    mode: Literal["blind", "named"] | None = None
    """of votes: only those cast with the names hidden, or shown"""
    since: str = ""
    """of votes: only those cast at this day or time (UTC) or later"""
    until: str = ""
    """of votes: only those cast before this day or time (UTC)"""
    voter: list[str] = Field(default_factory=list)
    """of votes: only those of these voters"""
    models: list[str] = Field(default_factory=list)
    """of votes: only those with this model, or between two of these; a name without @ is all its versions"""
    truncated: Literal["drop", "keep"] = "drop"
    """votes on answers that were stopped before their end: left out and counted, or kept"""
    both_bad: Literal["unpaired", "drop"] = "unpaired"
    """votes for neither: both answers are bad examples where a stage takes answers one by one (KTO), or left out"""
    part: Literal["train", "test"] | None = None
    """take one side of a split by the content of the prompts; rows that share a prompt are on the same side"""
    test_share: float = Field(0.1, gt=0, lt=1)
    """how much of the prompts is on the test side"""
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
    scorer: str | None = Field(None, pattern="^[a-z][a-z0-9_]*$")
    """how `align.evaluate` scores answers to it; looked up there by name"""
    check: Check | None = None
    """an example, run by a test"""

    @field_validator("label_map", "labels", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        return dict(_spelled(value)) if isinstance(value, dict) else value

    @field_validator("since", "until", mode="before")
    @classmethod
    def _text_of_a_time(cls, value: Any) -> Any:
        return str(value) if isinstance(value, date) else value

    @field_validator("voter", "models", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @property
    def votes(self) -> VoteFilter:
        """Which votes are asked for."""
        return VoteFilter(self.mode or "", self.since, self.until, tuple(self.voter), tuple(self.models))

    @model_validator(mode="after")
    def _known_parts(self) -> DatasetConfig:
        if bool(self.source) == bool(self.mix):
            found = "it has both" if self.mix else "missing"
            raise UsageError(f"source: {found}; give source: FILE or mix: [{{name: ..., weight: ...}}], one of them")
        if self.mix:
            _check_mixture(self)
        elif self.rows or "stopping" in self.model_fields_set:
            raise UsageError("rows and stopping: belong to a mixture; write limit: to take a part of a dataset")
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r};{nearest(self.format, ['auto', *FORMATS])}")
        if self.format != "labels" and (self.labels or self.question):
            raise ValueError("labels and question: belong to format labels; write format: labels")
        parts = FORMATS[self.format].synonyms if self.format != "auto" else _all_parts()
        for part in self.columns:
            if part not in parts:
                raise ValueError(f"columns: no part {part!r} in format {self.format};{nearest(part, parts)}")
        for tag in self.tags:
            if tag not in _TAG_KEYS:
                raise ValueError(f"tags: no tag {tag!r};{nearest(tag, _TAG_KEYS)}")
        return self


@dataclass(frozen=True, slots=True)
class Dataset:
    """One dataset a spec names: its settings, its name and the folder its source is looked up from."""

    name: str
    config: DatasetConfig
    folder: Path


_OPTIONS = ("limit", "seed", "split", "subset", "revision", "format", "entry", "ties", "rows", "stopping")
_OF_FILES = ("encoding", "quoting", "rows_at")
_OF_VOTES = ("mode", "since", "until", "voter", "models", "truncated", "both_bad", "part", "test_share")
_OF_MIXTURES = {"mix", "rows", "stopping", "limit", "seed", "license", "language", "description"}


def _check_mixture(config: DatasetConfig) -> None:
    if extra := sorted(config.model_fields_set - _OF_MIXTURES):
        raise UsageError(f"{', '.join(extra)}: not for a mixture, which has {', '.join(sorted(_OF_MIXTURES))}")
    names = [member.name for member in config.mix]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"mix: {twice} is listed twice; list it once with the sum of the weights")


def _spelled(label_map: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a label map by the text of their keys; YAML takes a bare yes for true, so both are meant."""
    for key, meaning in label_map.items():
        spellings = {True: ("true", "yes"), False: ("false", "no")}[key] if isinstance(key, bool) else (str(key),)
        yield from ((spelling, meaning) for spelling in spellings)


def _parts_of_rows() -> set[str]:
    """The parts that a column can be named for behind a file's name, as in FILE:prompt=COLUMN."""
    return set(_all_parts()) - {*_OPTIONS, *_OF_FILES, *_ELSEWHERE, *_OF_VOTES}


def _all_parts() -> list[str]:
    return sorted({part for known in FORMATS.values() for part in known.synonyms})


def catalogue() -> dict[str, Path]:
    """Every known dataset by name: those in ./datasets_cfg, then those that come with the project."""
    files = [*SHIPPED.glob("*.yaml"), *Path("datasets_cfg").glob("*.yaml")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def find(spec: str) -> Dataset:
    """The dataset a spec names: NAME, a file, a folder or hf://owner/name, then options such as `:limit=500`."""
    target, *groups = OPTION.split(spec)
    options = [option for group in groups for option in _NEXT_OPTION.split(group)]
    try:
        dataset = _find_target(target)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(
            f"{shorten(target, 300)}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    values: dict[str, Any] = {}
    for key, text in (_read_option(spec, option) for option in options):
        if key in _parts_of_rows():
            values["columns"] = values.get("columns", dataset.config.columns) | {key: text}
        else:
            values[key] = text
    if values:
        given = dataset.config.model_dump(exclude_unset=True, exclude=_OF_THE_HUB if "source" in values else None)
        dataset = Dataset(_short_name(target, options), build(DatasetConfig, given | values), dataset.folder)
    return _open_info(dataset) if dataset.config.source.endswith(_INFO) else dataset


def _short_name(target: str, options: list[str]) -> str:
    """A spec without the folders in it."""
    return ":".join(part.rsplit("/", 1)[-1] for part in (target, *options))


def read_entry(name: str, path: Path) -> Dataset:
    """The dataset a YAML of the catalogue describes; UsageError names the file."""
    return Dataset(name, _build_from(path, read_yaml(path)), path.parent)


def _build_from(path: Path, values: dict[str, Any]) -> DatasetConfig:
    try:
        return build(DatasetConfig, values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def make_layout(config: DatasetConfig, format_name: str, view: View | None) -> RowLayout:
    """How the rows of a dataset are laid out, once its format is known."""
    known = FORMATS[format_name]
    return RowLayout(
        known.synonyms,
        config.columns,
        make_tags(config.tags, known.tags),
        view,
        config.label_map,
        config.ties,
        config.labels,
        config.question,
        config.truncated,
        config.both_bad,
    )


def make_tags(given: dict[str, str], default: Tags) -> Tags:
    """The tags a dataset spells out over the defaults of its format; roles named here replace the usual spellings."""
    roles = {spelling: role for spelling, role in default.roles.items() if _tag_of(role) not in given}
    for tag in ("system", "user", "assistant", "tool", "tool_call"):
        if tag in given:
            roles[given[tag]] = CALL if tag == "tool_call" else tag
    return Tags(given.get("role", default.role), given.get("content", default.content), roles)


def _tag_of(role: str) -> str:
    return "tool_call" if role == CALL else role


def _read_option(spec: str, option: str) -> tuple[str, Any]:
    key, _, text = option.partition("=")
    known = (*_OPTIONS, *_OF_FILES, *_ELSEWHERE, *_OF_VOTES)
    if key not in known and key not in _parts_of_rows():
        raise UsageError(f"{spec}: unknown option {key!r};{nearest(key, [*known, *_parts_of_rows()])}")
    return key, text


def _find_target(target: str) -> Dataset:
    path = Path(target)
    if target.startswith("hf://"):
        return Dataset(target.removeprefix("hf://"), DatasetConfig(source=target), Path())
    if path.suffix in (".yaml", ".yml"):
        recipe = _read_recipe(path)
        if recipe is None:
            return Dataset(path.name, DatasetConfig(source=target), Path())
        return Dataset(path.stem, _build_from(path, recipe), path.parent)
    known = catalogue()
    if target in known:
        return read_entry(target, known[target])
    if _HUB_ID.fullmatch(target) and not path.parent.exists():
        raise DataError(f"{target}: no such file or folder; a hub dataset is written hf://{target}")
    if path.exists() or "/" in target or "." in target:
        return Dataset(path.name or target, DatasetConfig(source=target), Path())
    raise DataError(
        f"{target}: no dataset of this name and no such file;{nearest(target, known)} "
        "`align data list` shows all; a hub dataset is written hf://owner/name"
    )


def _read_recipe(path: Path) -> dict[str, Any] | None:
    """The settings in a dataset YAML; None for a YAML file of rows, and DataError for one that is neither."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file; name the file itself")
    held = load_yaml(path.read_text(encoding="utf-8-sig", errors="replace"), str(path)) if path.is_file() else None
    if held is None:
        return read_yaml(path)
    if isinstance(held, dict) and (
        held.keys() & {"source", "format", "mix"} or held.keys() <= DatasetConfig.model_fields.keys()
    ):
        return read_yaml(path)
    if isinstance(held, list) or (isinstance(held, dict) and (rows_key(held) is not None or recognise(held))):
        return None
    found = ", ".join(map(str, list(held)[:8])) if isinstance(held, dict) else f"a {type(held).__name__}"
    raise DataError(
        f"{path}: a YAML file describes a dataset (source:, format: ...) or is a list of rows; this one has {found}; "
        "name the data file under source: in another YAML, with rows_at: for the key that holds its rows"
    )


def _open_info(dataset: Dataset) -> Dataset:
    """The entry of a LLaMA-Factory dataset_info.json as our own settings."""
    path = dataset.folder / dataset.config.source
    path = path if path.is_file() else Path(dataset.config.source)
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file; name the file itself")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{dataset.config.source}: cannot be read as JSON ({error}); check the path") from None
    name = dataset.config.entry
    if name is None or name not in entries:
        found = f"no entry {name!r}" if name else "no entry is named"
        raise DataError(
            f"{path.name}: {found}; write {dataset.config.source}:entry=NAME;{nearest(name or '', entries)}"
        )
    values = _translate(entries[name], f"{path.name} entry {name}")
    own = dataset.config.model_dump(exclude_unset=True, exclude={"source", "entry"})
    return Dataset(name, build(DatasetConfig, values | own), path.parent)


_INFO_COLUMNS = {"query": "input", "response": "output", "kto_tag": "label"}
_INFO_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "system_tag": "system",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "tool_call",
}
_MEDIA = ("images", "videos", "audios")


def _translate(entry: dict[str, Any], where: str) -> dict[str, Any]:
    columns = {key: column for key, column in (entry.get("columns") or {}).items() if column}
    if media := [key for key in _MEDIA if key in columns]:
        raise DataError(f"{where}: it holds {', '.join(media)}; only text can be trained on here")
    format_name = {"sharegpt": "sharegpt", "openai": "messages"}.get(entry.get("formatting", "alpaca"), "alpaca")
    if format_name == "alpaca" and set(columns) == {"prompt"}:
        format_name, columns = "text", {"text": columns["prompt"]}
    values: dict[str, Any] = {"source": _info_source(entry, where), "format": format_name}
    values["columns"] = {_INFO_COLUMNS.get(key, key): column for key, column in columns.items()}
    values["tags"] = {_INFO_TAGS[key]: tag for key, tag in (entry.get("tags") or {}).items() if key in _INFO_TAGS}
    options = {"subset": "subset", "split": "split", "num_samples": "limit"}
    return values | {ours: entry[theirs] for theirs, ours in options.items() if entry.get(theirs)}


def _info_source(entry: dict[str, Any], where: str) -> str:
    if "script_url" in entry:
        raise DataError(f"{where}: it is loaded by a script, which is not run; give the data as a file")
    if "file_name" in entry:
        return str(entry["file_name"])
    if "hf_hub_url" in entry:
        return f"hf://{entry['hf_hub_url']}"
    raise DataError(f"{where}: neither file_name nor hf_hub_url; give the data as a file")
