"""The settings of a dataset: a file or folder, a hub dataset, votes, or a mixture, each with its own fields."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from align.config import Settings, build
from align.data.formats import FORMATS
from align.data.formats.row_layout import RowLayout
from align.data.formats.turns import CALL, Tags
from align.data.vote_filter import VoteFilter
from align.errors import UsageError, nearest
from align.schema import View

PARTS = sorted({part for row_format in FORMATS.values() for part in row_format.columns})
"""Every part that a column can play in some format."""
HUB = "hf://"
_TAG_KEYS = ("role", "content", "system", "user", "assistant", "tool", "tool_call")
_YES_NO = {True: ("true", "yes"), False: ("false", "no")}


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
        spellings = {key: _YES_NO[key] if isinstance(key, bool) else (str(key),) for key in value}
        return {spelling: meaning for key, meaning in value.items() for spelling in spellings[key]}

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
        """Return the layout of the rows, once their format is known."""
        row_format = FORMATS[format_name]
        return RowLayout(
            row_format.columns,
            self.columns,
            _merge_tags(self.tags, row_format.tags),
            view,
            self.label_map,
            self.ties,
            self.labels,
            self.question,
        )


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


class VoteDataset(FileDataset):
    """Votes of the comparison page, or some of them."""

    kind: ClassVar[str] = "votes"

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

    @field_validator("since", "until", mode="before")
    @classmethod
    def _text_of_time(cls, value: Any) -> Any:
        return str(value) if isinstance(value, date) else value

    @field_validator("voter", "models", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @property
    def vote_filter(self) -> VoteFilter:
        """Return the votes that are wanted."""
        return VoteFilter(self.mode or "", self.since, self.until, tuple(self.voter), tuple(self.models))

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


def _merge_tags(given: dict[str, str], default: Tags) -> Tags:
    """Return the tags of a format with those a dataset names; a role named here replaces its usual spellings."""
    roles = {spelling: role for spelling, role in default.roles.items() if role not in given}
    for tag in ("system", "user", "assistant", "tool", CALL):
        if tag in given:
            roles[given[tag]] = tag
    return Tags(given.get("role", default.role), given.get("content", default.content), roles)
