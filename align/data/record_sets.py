"""Records once they are read: the views they give; of a set of them the digest, repeats, contradictions, bias, leaks.

Nothing here reads files. `Findings` gives sentences for the user; a leak is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import orjson

from align.data.row_errors import RowSkipped
from align.errors import DataError
from align.schema import Messages, Record, View, with_article

_NEEDS = {
    "text": "text, or a conversation",
    "demonstration": "completion or chosen",
    "preference": "chosen and rejected",
    "unpaired": "completion with label, or chosen and rejected",
    "prompt": "prompt",
}
"""The parts that a view needs."""

_TEMPLATE_VARIABLE = re.compile(r"\{\{\s*[A-Za-z_][\w.]{0,40}\s*\}\}")
# UTF-8 read as Latin-1 or Windows-1252, and the two best known accidents of GBK.
_MOJIBAKE = re.compile("[ÃÂ][\x80-\xbf]|â€[\x80-\xbf™œ“”˜¦]|ï»¿|锟斤拷|烫烫烫")
_MOJIBAKE_STARTS = ("Ã", "Â", "â€", "ï»¿", "锟", "烫")
"""Searched before the pattern: a plain search is several times faster, and nearly no text has any of these."""

LONGER_SHARE = 0.7
"""From this share on, answers of one length class winning is worth a warning."""
_SIGNIFICANT = 0.01
_LABEL_RATIO = 3
_LISTED_LEAKS = 3

Location = tuple[str, int | None]


@dataclass(frozen=True)
class RecordSet:
    """Checked records with the digest of their content and counts of what was left out."""

    records: list[Record]
    name: str
    digest: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    members: list[dict[str, Any]] = field(default_factory=list)
    """name, digest and rows of each dataset the records come from"""

    def describe(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        entry = {"name": self.name, "digest": self.digest, "rows": self.rows, "dropped": self.dropped}
        return entry | ({"members": self.members} if len(self.members) > 1 else {})


def natural_view(record: Record) -> View:
    """Return the view a record was made for."""
    if record.text is not None:
        return "text"
    if record.chosen is not None:
        return "preference"
    if record.completion is None:
        return "prompt"
    return "demonstration" if record.label is None else "unpaired"


def convert(record: Record, view: View | None, name: str) -> list[Record]:
    """Return the records a record gives in a view (None: as it is); DataError when it has not what the view needs.

    Raises RowSkipped for a completion that is labelled bad and is asked for as a demonstration.
    """
    natural = natural_view(record)
    if view is None or view == natural or (natural, view) == ("demonstration", "text"):  # rendering writes that out
        return [record]
    given = replace(record, completion=None, chosen=None, rejected=None, label=None, margin=None)
    match natural, view:
        case "preference" | "unpaired" | "demonstration", "prompt":
            pass
        case "unpaired", "demonstration":
            if not record.label:
                raise RowSkipped("labelled bad")
            given.completion = record.completion
        case "preference", "demonstration":
            given.completion = record.chosen
        case "preference", "unpaired":
            given.completion, given.label = record.chosen, True
            return [given, replace(given, completion=record.rejected, label=False)]
        case _:
            raise DataError(
                f"{name}: asked for the view {view}, which needs {_NEEDS[view]}; {record.where} is "
                f"{with_article(natural)} row; give data of that kind, or name the columns in a dataset YAML"
            )
    return [given]


class Digest:
    """A digest that grows record by record.

    Where a record came from (file and line) is not content; weights, ids and other columns are.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, record: Record) -> int:
        """Add a record, and return the bytes of its content as JSON."""
        text = _canonical_json(_content(record), record)
        self._sha256.update(text)
        if extras := _extras(record):
            self._sha256.update(_canonical_json(extras, record))
        self._sha256.update(b"\n")
        return len(text)

    @property
    def value(self) -> str:
        """Return `sha256:` and the digest of all records so far."""
        return f"sha256:{self._sha256.hexdigest()}"


def digest_records(records: Iterable[Record]) -> str:
    """Return the digest of the records' content in order."""
    digest = Digest()
    for record in records:
        digest.add(record)
    return digest.value


def _content(record: Record) -> dict[str, Any]:
    """Return the parts that are learned. Spelled out: a loop over names, once a row, takes three times as long."""
    content: dict[str, Any] = {"prompt": record.prompt}
    if record.completion is not None:
        content["completion"] = record.completion
    if record.chosen is not None:
        content["chosen"] = record.chosen
        content["rejected"] = record.rejected
    if record.label is not None:
        content["label"] = record.label
    if record.answer is not None:
        content["answer"] = record.answer
    if record.text is not None:
        content["text"] = record.text
    if record.tools is not None:
        content["tools"] = record.tools
    return content


def _extras(record: Record) -> dict[str, Any]:
    extras: dict[str, Any] = {"meta": record.meta} if record.meta else {}
    if record.id is not None:
        extras["id"] = record.id
    if record.weight is not None:
        extras["weight"] = record.weight
    if record.margin is not None:
        extras["margin"] = record.margin
    if record.score is not None:
        extras["score"] = record.score
    return extras


def _canonical_json(content: dict[str, Any], record: Record) -> bytes:
    """Return one JSON text for one content, whatever the order of its keys."""
    try:
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:  # numbers beyond 64 bits, lone surrogates, dates and bytes of Parquet files
        if "ecursion" in str(error):
            raise DataError(f"{record.where} row: is nested too deeply; flatten it or remove the row") from None
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        return text.encode("utf-8", "surrogatepass")


# What a record can be counted under, with the sentence about all of them, in the order of the report.
_SENTENCES = {
    "repeated": "{count} rows repeat an earlier row exactly (first {first})",
    "same_id": "{count} rows have the id of an earlier, other row (first {first})",
    "shared_prompt": "{count} pairs share their prompt with an earlier pair; there are {prompts} prompts",
    "contradictions": "{count} rows contradict an earlier row: the same answers with the opposite verdict "
    "(first {first}); keep one of the two",
    "near_equal": "{count} pairs differ in case, spacing or Unicode form alone (first {first}); there is nothing else "
    "to prefer in them",
}
_LATER_SENTENCES = {
    "weighed": "{count} rows have a weight (first {first}); every row counts once in training: weigh whole sets in a "
    "mixture instead",
    "variables": "{count} rows hold template variables such as {names} (first {first}); they are learned as they "
    "stand, so fill them in",
    "replaced": "{count} rows ({share:.1%}) hold U+FFFD, a character lost in decoding (first {first})",
    "mojibake": "{count} rows ({share:.1%}) hold mojibake (first {first})",
}


@dataclass
class Findings:
    """The counts of what is noticed about a set; a record costs a few numbers and no text."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """records by the sentence they are counted under"""
    chosen_longer: int = 0
    rejected_longer: int = 0
    good: int = 0
    bad: int = 0
    _first: dict[str, str] = field(default_factory=dict)
    _variables: Counter[str] = field(default_factory=Counter)
    _contents: set[int] = field(default_factory=set)
    _ids: dict[int, Location] = field(default_factory=dict)
    _prompts: set[object] = field(default_factory=set)
    _verdicts: dict[int, Location] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """Return the number of different prompts."""
        return len(self._prompts)

    def add(self, record: Record) -> None:
        """Take one more record into account."""
        self.rows += 1
        content = _content_key(record, ordered=True)
        self._add_identity(record, content)
        self._add_text(record)
        if record.weight not in (None, 1):
            self._count("weighed", record)
        if record.chosen is not None and record.rejected is not None:
            longer = characters(record.chosen) - characters(record.rejected)
            self.chosen_longer += longer > 0
            self.rejected_longer += longer < 0
            if _normalised(record.chosen) == _normalised(record.rejected):
                self._count("near_equal", record)
            prompt, (chosen, rejected), *_ = content
            verdict, opposite = hash((prompt, chosen, rejected)), hash((prompt, rejected, chosen))
        elif record.label is not None:
            self.good += record.label
            self.bad += not record.label
            verdict, opposite = hash((content, record.label)), hash((content, not record.label))
        else:
            return
        location = (record.source, record.line)
        if self._verdicts.get(opposite, location) != location:  # a tie kept in both orders may contradict itself
            self._count("contradictions", record)
        self._verdicts.setdefault(verdict, location)

    def _count(self, name: str, record: Record) -> None:
        self.counts[name] += 1
        self._first.setdefault(name, record.where)

    def _add_identity(self, record: Record, content: tuple[Any, ...]) -> None:
        key = hash((content, record.label))
        if key in self._contents:
            self._count("repeated", record)
        self._contents.add(key)
        # Both records that one row makes (of a tie, or of a pair seen as two labels) rightly have its id.
        location = (record.source, record.line)
        if record.id is not None and self._ids.setdefault(hash(record.id), location) != location:
            self._count("same_id", record)
        if record.chosen is not None and content[0] in self._prompts:
            self._count("shared_prompt", record)
        self._prompts.add(content[0])

    def _add_text(self, record: Record) -> None:
        problems = set()
        turns = chain(record.prompt, record.completion or (), record.chosen or (), record.rejected or ())
        for text in chain((record.text or "",), (turn["content"] for turn in turns)):
            if "{{" in text and (names := _TEMPLATE_VARIABLE.findall(text)):
                self._variables.update(dict.fromkeys(names, 1))
                problems.add("variables")
            if not text.isascii():
                if "\ufffd" in text:
                    problems.add("replaced")
                if any(start in text for start in _MOJIBAKE_STARTS) and _MOJIBAKE.search(text):
                    problems.add("mojibake")
        for problem in problems:
            self._count(problem, record)

    def sentences(self) -> list[str]:
        """Return what is worth telling, in sentences; none about a sound set."""
        return [*self._fill(_SENTENCES), *self._biases(), *self._fill(_LATER_SENTENCES)]

    def _fill(self, sentences: dict[str, str]) -> Iterator[str]:
        names = ", ".join(name for name, _ in self._variables.most_common(5))
        for name, sentence in sentences.items():
            if count := self.counts[name]:
                share, first = count / self.rows, self._first[name]
                yield sentence.format(count=count, first=first, share=share, prompts=self.prompts, names=names)

    def _biases(self) -> Iterator[str]:
        from align.statistics import sign_test

        unequal = self.chosen_longer + self.rejected_longer
        for word, count in (("longer", self.chosen_longer), ("shorter", self.rejected_longer)):
            if unequal and count / unequal >= LONGER_SHARE and sign_test(count, unequal - count) < _SIGNIFICANT:
                yield (
                    f"chosen is {word} in {count} of {unequal} pairs of unequal length ({count / unequal:.0%}); "
                    "length may be learned in place of quality"
                )
        few, many = sorted((self.good, self.bad))
        if many > _LABEL_RATIO * few:
            yield (
                f"labels are unbalanced: {self.good} good, {self.bad} bad; "
                "take a part of the larger, or weigh the smaller more"
            )


def find_problems(records: Iterable[Record]) -> list[str]:
    """Return what is worth telling about a set of records as a whole, in sentences."""
    findings = Findings()
    for record in records:
        findings.add(record)
    return findings.sentences()


def refuse_leak(train: RecordSet, held_out: RecordSet) -> None:
    """Raise DataError when held-out rows are also training rows, naming their number and the first of them.

    Rows are the same when prompt and answers are; which of two answers was chosen does not matter.
    """
    leak = LeakCheck()
    for record in train.records:
        leak.add(record)
    for record in held_out.records:
        leak.look_up(record)
    leak.refuse(train.name, held_out.name)


@dataclass
class LeakCheck:
    """A check of which held-out records are in a training set."""

    _train: dict[int, Location] = field(default_factory=dict)
    _rows: int = 0
    _shared: int = 0
    _listed: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Add a training record."""
        self._train.setdefault(hash(_content_key(record, ordered=False)), (record.source, record.line))

    def look_up(self, record: Record) -> None:
        """Look up a held-out record."""
        self._rows += 1
        if (location := self._train.get(hash(_content_key(record, ordered=False)))) is not None:
            self._shared += 1
            source, line = location
            if self._shared <= _LISTED_LEAKS:
                self._listed.append(f"{record.where} is {Record(source=source, line=line).where}")

    def refuse(self, train: str, held_out: str) -> None:
        """Raise DataError if any record was shared."""
        if self._shared:
            listed = ", ".join([*self._listed, *(["..."] if self._shared > _LISTED_LEAKS else [])])
            raise DataError(
                f"{held_out}: {self._shared} of its {self._rows} rows are in {train} too ({listed}), "
                "so evaluation would measure memory; take them out, or split anew with `align data split`"
            )


def characters(turns: Messages) -> int:
    """Return the characters of some turns."""
    return sum(len(turn["content"]) for turn in turns)


def _content_key(record: Record, *, ordered: bool) -> tuple[Any, ...]:
    """Return a key of a record's content, its prompt or text first; unless `ordered`, a pair has that of its reverse.

    The numbers in it stand for their texts within this process.
    """
    answer: object = None
    if record.chosen is not None and record.rejected is not None:
        pair = (_turns_key(record.chosen), _turns_key(record.rejected))
        answer = pair if ordered else frozenset(pair)
    elif record.completion is not None:
        answer = _turns_key(record.completion)
    prompt = _turns_key(record.prompt) if record.text is None else hash(record.text)
    return prompt, answer, record.answer if ordered else None, str(record.tools) if record.tools else None


def _turns_key(turns: Messages) -> int:
    return hash(tuple((turn["role"], turn["content"], str(turn.get("tool_calls") or "")) for turn in turns))


def _normalised(turns: Messages) -> list[tuple[str, str]]:
    """Return an answer without case, spacing and Unicode form."""
    return [
        ("".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split()), str(turn.get("tool_calls") or ""))
        for turn in turns
    ]
