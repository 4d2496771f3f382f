"""A set of records as a whole: its digest, and checks for repeats, contradictions, bias, and leaks between sets.

Nothing here reads files or stops a row. `Findings` gives sentences for the user; a leak is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from align.errors import DataError
from align.schema import Messages, Record

_TEMPLATE_VARIABLE = re.compile(r"\{\{\s*[A-Za-z_][\w.]{0,40}\s*\}\}")
# UTF-8 read as Latin-1 or Windows-1252, and the two best known accidents of GBK.
_MOJIBAKE = re.compile("[ÃÂ][\x80-\xbf]|â€[\x80-\xbf™œ“”˜¦]|ï»¿|锟斤拷|烫烫烫")
_MOJIBAKE_STARTS = ("Ã", "Â", "â€", "ï»¿", "锟", "烫")
"""Searched before the pattern: a plain search is several times faster, and nearly no text has any of these."""
_REPLACEMENT = "\ufffd"

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
    prompts: int = 0
    """different prompts"""
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

    def add(self, record: Record) -> None:
        """Take one more record into account."""
        self.rows += 1
        self._add_identity(record)
        self._add_text(record)
        if record.weight not in (None, 1):
            self._count("weighed", record)
        if record.chosen is not None and record.rejected is not None:
            self._add_pair(record, record.chosen, record.rejected)
        elif record.label is not None:
            self._add_label(record, record.label)

    def _count(self, name: str, record: Record) -> None:
        self.counts[name] += 1
        self._first.setdefault(name, record.where)

    def _add_identity(self, record: Record) -> None:
        content = _content_key(record, ordered=True)
        key = hash((content, record.label))
        if key in self._contents:
            self._count("repeated", record)
        self._contents.add(key)
        if record.id is not None:
            # Both records that one row makes (of a tie, or of a pair seen as two labels) rightly have its id.
            location = (record.source, record.line)
            if self._ids.setdefault(hash(record.id), location) != location:
                self._count("same_id", record)
        prompt = content[0]
        if prompt not in self._prompts:
            self._prompts.add(prompt)
            self.prompts += 1
        elif record.chosen is not None:
            self._count("shared_prompt", record)

    def _add_text(self, record: Record) -> None:
        problems = set()
        for text in _texts_of(record):
            if "{{" in text and (names := _TEMPLATE_VARIABLE.findall(text)):
                self._variables.update(dict.fromkeys(names, 1))
                problems.add("variables")
            if not text.isascii():
                if _REPLACEMENT in text:
                    problems.add("replaced")
                if any(start in text for start in _MOJIBAKE_STARTS) and _MOJIBAKE.search(text):
                    problems.add("mojibake")
        for problem in problems:
            self._count(problem, record)

    def _add_pair(self, record: Record, chosen: Messages, rejected: Messages) -> None:
        longer = characters(chosen) - characters(rejected)
        self.chosen_longer += longer > 0
        self.rejected_longer += longer < 0
        if _normalised(chosen) == _normalised(rejected):
            self._count("near_equal", record)
        prompt, good, bad = _prompt_key(record), _turns_key(chosen), _turns_key(rejected)
        self._add_verdict(record, hash((prompt, good, bad)), hash((prompt, bad, good)))

    def _add_label(self, record: Record, label: bool) -> None:
        self.good += label
        self.bad += not label
        content = _content_key(record, ordered=True)
        self._add_verdict(record, hash((content, label)), hash((content, not label)))

    def _add_verdict(self, record: Record, verdict: int, opposite: int) -> None:
        location = (record.source, record.line)
        if self._verdicts.get(opposite, location) != location:  # a tie kept in both orders may contradict itself
            self._count("contradictions", record)
        self._verdicts.setdefault(verdict, location)

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
    leak = LeakCheck(train.records)
    for record in held_out.records:
        leak.look_up(record)
    leak.refuse(train.name, held_out.name)


class LeakCheck:
    """A check of which held-out records are in a training set."""

    def __init__(self, train: Iterable[Record] = ()) -> None:
        self._train: dict[int, Location] = {}
        self._rows = 0
        self._shared = 0
        self._listed: list[str] = []
        for record in train:
            self.add(record)

    def add(self, record: Record) -> None:
        """Add a training record."""
        self._train.setdefault(hash(_content_key(record, ordered=False)), (record.source, record.line))

    def look_up(self, record: Record) -> None:
        """Look up a held-out record."""
        self._rows += 1
        location = self._train.get(hash(_content_key(record, ordered=False)))
        if location is not None:
            self._shared += 1
            if len(self._listed) < _LISTED_LEAKS:
                self._listed.append(f"{record.where} is {Record(source=location[0], line=location[1]).where}")

    def refuse(self, train: str, held_out: str) -> None:
        """Raise DataError if any record was shared."""
        if not self._shared:
            return
        listed = ", ".join([*self._listed, *(["..."] if self._shared > len(self._listed) else [])])
        raise DataError(
            f"{held_out}: {self._shared} of its {self._rows} rows are in {train} too ({listed}), "
            "so evaluation would measure memory; take them out, or split anew with `align data split`"
        )


def _prompt_key(record: Record) -> int:
    """Return a number that stands for a prompt (or a text) within this process."""
    return hash(record.text) if record.text is not None else _turns_key(record.prompt)


def _texts_of(record: Record) -> Iterator[str]:
    """Yield every text of a record: contents of all its turns, or its raw text."""
    if record.text is not None:
        yield record.text
    for turns in (record.prompt, record.completion, record.chosen, record.rejected):
        for turn in turns or ():
            yield turn["content"]


def characters(turns: Messages) -> int:
    """Return the characters of some turns."""
    return sum(len(turn["content"]) for turn in turns)


def _content_key(record: Record, *, ordered: bool) -> tuple[object, ...]:
    """Return a key of a record's content; unless `ordered`, a pair has the key of its reverse."""
    if record.chosen is None or record.rejected is None:
        answer: object = None if record.completion is None else _turns_key(record.completion)
    else:
        pair = (_turns_key(record.chosen), _turns_key(record.rejected))
        answer = pair if ordered else frozenset(pair)
    return _prompt_key(record), answer, record.answer if ordered else None, str(record.tools) if record.tools else None


def _turns_key(turns: Messages) -> int:
    return hash(tuple((turn["role"], turn["content"], str(turn.get("tool_calls") or "")) for turn in turns))


def _normalised(turns: Messages) -> list[tuple[str, str]]:
    """Return an answer without case, spacing and Unicode form."""
    return [
        ("".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split()), str(turn.get("tool_calls") or ""))
        for turn in turns
    ]
