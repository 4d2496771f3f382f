"""Checks of records as a set: repeats, contradictions, bias, leaks between training and held-out data.

Nothing here reads files or stops a row. `Findings` gives sentences for the user; a leak is an error.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from align.errors import DataError
from align.schema import Messages, Record

if TYPE_CHECKING:
    from align.data.load import RecordSet

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


@dataclass(slots=True)
class Occurrences:
    """How often something occurred, and where first."""

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        """Count one more."""
        self.count += 1
        self.first = self.first or where


@dataclass
class Findings:
    """What is noticed about a set, record by record; it holds a few numbers a record and no text."""

    rows: int = 0
    repeated: Occurrences = field(default_factory=Occurrences)
    same_id: Occurrences = field(default_factory=Occurrences)
    prompts: int = 0
    """different prompts"""
    shared_prompt: Occurrences = field(default_factory=Occurrences)
    """pairs over a prompt that an earlier pair has too"""
    contradictions: Occurrences = field(default_factory=Occurrences)
    near_equal: Occurrences = field(default_factory=Occurrences)
    """pairs whose answers differ in case, spacing or Unicode form alone"""
    weighed: Occurrences = field(default_factory=Occurrences)
    """rows with a weight of their own, other than 1"""
    chosen_longer: int = 0
    rejected_longer: int = 0
    good: int = 0
    bad: int = 0
    variables: Occurrences = field(default_factory=Occurrences)
    variable_names: Counter[str] = field(default_factory=Counter)
    replaced: Occurrences = field(default_factory=Occurrences)
    mojibake: Occurrences = field(default_factory=Occurrences)
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
            self.weighed.add(record.where)
        if record.chosen is not None and record.rejected is not None:
            self._add_pair(record, record.chosen, record.rejected)
        elif record.label is not None:
            self._add_label(record, record.label)

    def _add_identity(self, record: Record) -> None:
        content = _content_key(record, ordered=True)
        key = hash((content, record.label))
        if key in self._contents:
            self.repeated.add(record.where)
        self._contents.add(key)
        if record.id is not None:
            # Both records that one row makes (of a tie, or of a pair seen as two labels) rightly have its id.
            location = (record.source, record.line)
            if self._ids.setdefault(hash(record.id), location) != location:
                self.same_id.add(record.where)
        prompt = content[0]
        if prompt not in self._prompts:
            self._prompts.add(prompt)
            self.prompts += 1
        elif record.chosen is not None:
            self.shared_prompt.add(record.where)

    def _add_text(self, record: Record) -> None:
        has_variables = is_replaced = is_mojibake = False
        for text in texts_of(record):
            if "{{" in text and (names := _TEMPLATE_VARIABLE.findall(text)):
                self.variable_names.update(dict.fromkeys(names, 1))
                has_variables = True
            if not text.isascii():
                is_replaced |= _REPLACEMENT in text
                if any(start in text for start in _MOJIBAKE_STARTS):
                    is_mojibake |= _MOJIBAKE.search(text) is not None
        if has_variables:
            self.variables.add(record.where)
        if is_replaced:
            self.replaced.add(record.where)
        if is_mojibake:
            self.mojibake.add(record.where)

    def _add_pair(self, record: Record, chosen: Messages, rejected: Messages) -> None:
        longer = characters(chosen) - characters(rejected)
        self.chosen_longer += longer > 0
        self.rejected_longer += longer < 0
        if _normalised(chosen) == _normalised(rejected):
            self.near_equal.add(record.where)
        prompt, good, bad = prompt_key(record), _turns_key(chosen), _turns_key(rejected)
        self._add_verdict(record, hash((prompt, good, bad)), hash((prompt, bad, good)))

    def _add_label(self, record: Record, label: bool) -> None:
        self.good += label
        self.bad += not label
        content = _content_key(record, ordered=True)
        self._add_verdict(record, hash((content, label)), hash((content, not label)))

    def _add_verdict(self, record: Record, verdict: int, opposite: int) -> None:
        location = (record.source, record.line)
        if self._verdicts.get(opposite, location) != location:  # a tie kept in both orders may contradict itself
            self.contradictions.add(record.where)
        self._verdicts.setdefault(verdict, location)

    def sentences(self) -> list[str]:
        """Return what is worth telling, in sentences; none about a sound set."""
        return [*self._repeats(), *self._biases(), *self._texts()]

    def _repeats(self) -> Iterator[str]:
        if self.repeated.count:
            yield f"{self.repeated.count} rows repeat an earlier row exactly (first {self.repeated.first})"
        if self.same_id.count:
            yield f"{self.same_id.count} rows have the id of an earlier, other row (first {self.same_id.first})"
        if self.shared_prompt.count:
            count = self.shared_prompt.count
            yield f"{count} pairs share their prompt with an earlier pair; there are {self.prompts} prompts"
        if self.contradictions.count:
            yield (
                f"{self.contradictions.count} rows contradict an earlier row: the same answers with the opposite "
                f"verdict (first {self.contradictions.first}); keep one of the two"
            )
        if self.near_equal.count:
            yield (
                f"{self.near_equal.count} pairs differ in case, spacing or Unicode form alone "
                f"(first {self.near_equal.first}); there is nothing else to prefer in them"
            )

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
        if self.weighed.count:
            yield (
                f"{self.weighed.count} rows have a weight (first {self.weighed.first}); every row counts once in "
                "training: weigh whole sets in a mixture instead"
            )

    def _texts(self) -> Iterator[str]:
        if self.variables.count:
            names = ", ".join(name for name, _ in self.variable_names.most_common(5))
            yield (
                f"{self.variables.count} rows hold template variables such as {names} (first {self.variables.first}); "
                "they are learned as they stand, so fill them in"
            )
        for rows, what in ((self.replaced, "U+FFFD, a character lost in decoding"), (self.mojibake, "mojibake")):
            if rows.count:
                yield f"{rows.count} rows ({rows.count / self.rows:.1%}) hold {what} (first {rows.first})"


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


def prompt_key(record: Record) -> int:
    """Return a number that stands for a prompt (or a text) within this process."""
    return hash(record.text) if record.text is not None else _turns_key(record.prompt)


def texts_of(record: Record) -> Iterator[str]:
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
    return prompt_key(record), answer, record.answer if ordered else None, str(record.tools) if record.tools else None


def _turns_key(turns: Messages) -> int:
    return hash(tuple((turn["role"], turn["content"], str(turn.get("tool_calls") or "")) for turn in turns))


def _normalised(turns: Messages) -> list[tuple[str, str]]:
    """Return an answer without case, spacing and Unicode form."""
    return [
        ("".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split()), str(turn.get("tool_calls") or ""))
        for turn in turns
    ]
