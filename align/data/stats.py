"""Statistics of a dataset, gathered in one pass: kinds, roles, lengths, scripts, tokens, and bias."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from align.data.record_sets import Findings, characters, natural_view
from align.data.rendering.render_view import render_view
from align.schema import Record, View

_SCRIPTS = {
    "Latin": re.compile("[A-Za-zÀ-ɏ]+"),
    "Han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+"),
    "Kana": re.compile("[\u3040-\u30ff]+"),
    "Hangul": re.compile("[\uac00-\ud7af\u1100-\u11ff]+"),
    "Cyrillic": re.compile("[\u0400-\u04ff]+"),
    "Greek": re.compile("[\u0370-\u03ff]+"),
    "Arabic": re.compile("[\u0600-\u06ff]+"),
    "Hebrew": re.compile("[\u0590-\u05ff]+"),
    "Devanagari": re.compile("[\u0900-\u097f]+"),
    "Thai": re.compile("[\u0e00-\u0e7f]+"),
}
_SCRIPT_CHARACTERS = 1000
"""Characters of a turn whose scripts are counted."""
_UNLIMITED = 1 << 30


def summarise_lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Return total, mean, percentiles (nearest rank) and extremes."""
    ordered = sorted(lengths)
    if not ordered:
        return {}
    ranks = {f"p{share}": ordered[max(0, -(-share * len(ordered) // 100) - 1)] for share in (50, 90, 99)}
    total = sum(ordered)
    ends = {"min": ordered[0], "max": ordered[-1]}
    return {"total": total, "mean": round(total / len(ordered), 1), **ranks, **ends}


@dataclass
class Stats:
    """The counts of a dataset: add batches, then read `summary()` or `table()`."""

    tokenizer: Any = None
    max_length: int = 1024
    findings: Findings = field(default_factory=Findings)
    kinds: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    systems: int = 0
    with_tools: int = 0
    lengths: defaultdict[str, array[int]] = field(default_factory=lambda: defaultdict(partial(array, "q")))
    """the values of a count over rows, at eight bytes a row"""
    too_long: int = 0
    untrainable: Counter[str] = field(default_factory=Counter)

    def add(self, batch: list[Record]) -> None:
        """Add a batch of records."""
        for record in batch:
            self._add(record)
        if self.tokenizer is not None:
            self._add_tokens(batch)

    def _add(self, record: Record) -> None:
        self.findings.add(record)
        self.kinds[natural_view(record)] += 1
        turns = [*record.prompt, *(record.completion or record.chosen or [])]
        if record.text is not None:
            self.lengths["text characters"].append(len(record.text))
            self._count_scripts(record.text)
            return
        self.lengths["turns"].append(len(turns))
        parts = {"prompt": record.prompt, "answer": record.completion}
        for part, answer in (parts | {"chosen": record.chosen, "rejected": record.rejected}).items():
            if answer is not None:
                self.lengths[f"{part} characters"].append(characters(answer))
        self.systems += any(turn["role"] == "system" for turn in turns)
        self.with_tools += bool(record.tools)
        for turn in [*turns, *((record.rejected or []) if record.chosen else [])]:
            self.roles[turn["role"]] += 1
            self._count_scripts(turn["content"])

    def _count_scripts(self, text: str) -> None:
        text = text[:_SCRIPT_CHARACTERS]
        scripts = {"Latin": _SCRIPTS["Latin"]} if text.isascii() else _SCRIPTS
        for script, pattern in scripts.items():
            if count := sum(map(len, pattern.findall(text))):
                self.scripts[script] += count

    def _add_tokens(self, batch: list[Record]) -> None:
        """Count the tokens of every row as a stage would render it, nothing cut, and the refused rows."""
        kind = natural_view(batch[0])
        view: View = "demonstration" if kind == "unpaired" else kind
        for part in [[record] for record in batch] if view == "text" else [batch]:
            rendered = render_view(view, part, self.tokenizer, _UNLIMITED)
            self.untrainable.update(rendered.dropped)
            for counts in map(_token_counts, rendered.rows):
                self.too_long += max(counts.values()) > self.max_length
                for name, count in counts.items():
                    self.lengths[name].append(count)

    def summary(self) -> dict[str, Any]:
        """Return all numbers, for `--json`."""
        findings = self.findings
        letters = sum(self.scripts.values())
        numbers: dict[str, Any] = {
            "records": findings.rows,
            "kinds": dict(self.kinds),
            "prompts": findings.prompts,
            "roles": dict(self.roles),
            "with_system": self.systems,
            "with_tools": self.with_tools,
            "scripts": {script: round(count / letters, 4) for script, count in self.scripts.most_common()},
            "repeated": findings.counts["repeated"],
            **{name.replace(" ", "_"): summarise_lengths(lengths) for name, lengths in self.lengths.items()},
        }
        if findings.chosen_longer or findings.rejected_longer:
            numbers |= {"chosen_longer": findings.chosen_longer, "rejected_longer": findings.rejected_longer}
        if findings.good or findings.bad:
            numbers |= {"labelled_good": findings.good, "labelled_bad": findings.bad}
        if self.tokenizer is not None:
            numbers |= {"max_length": self.max_length, "longer_than_max_length": self.too_long}
            numbers |= {"not_rendered": dict(self.untrainable)} if self.untrainable else {}
        return numbers | {"remarks": findings.sentences()}

    def table(self) -> Iterator[str]:
        """Yield the same as lines of text."""
        findings = self.findings
        letters = sum(self.scripts.values())
        yield _line("records", _counts(self.kinds))
        yield _line("prompts", f"{findings.prompts} different")
        if self.roles:
            yield _line("roles", _counts(self.roles))
            yield _line("system", f"{self.systems} rows" + (f"; tools in {self.with_tools}" if self.with_tools else ""))
        shares = {script: count / letters for script, count in self.scripts.most_common() if count / letters >= 0.001}
        yield _line("scripts", ", ".join(f"{script} {share:.1%}" for script, share in shares.items()) or "none")
        yield _line("repeated", f"{findings.counts['repeated']} rows")
        if unequal := findings.chosen_longer + findings.rejected_longer:
            share = findings.chosen_longer / unequal
            yield _line("chosen longer", f"{findings.chosen_longer} of {unequal} pairs of unequal length ({share:.0%})")
        if findings.good or findings.bad:
            yield _line("labels", f"{findings.good} good, {findings.bad} bad")
        columns = ("mean", "p50", "p90", "p99", "max", "total")
        yield _line("", "".join(f"{column:>12}" for column in columns))
        for name, lengths in self.lengths.items():
            numbers = summarise_lengths(lengths)
            yield _line(name, "".join(f"{numbers[column]:>12,}" for column in columns))
        if self.tokenizer is not None:
            yield _line("too long", f"{self.too_long} rows have more than {self.max_length} tokens")
            for reason, count in self.untrainable.items():
                yield _line("not rendered", f"{count} rows: {reason}")


def _line(name: str, value: str) -> str:
    return f"  {name:<20}{value}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "0"


def _token_counts(row: dict[str, Any]) -> dict[str, int]:
    if "input_ids" in row:
        trained = {"trained tokens": sum(row["completion_mask"])} if "completion_mask" in row else {}
        return {"tokens": len(row["input_ids"])} | trained
    prompt = len(row["prompt_ids"])
    answers = {side: row[f"{side}_ids"] for side in ("chosen", "rejected") if f"{side}_ids" in row}
    return {"prompt tokens": prompt} | {f"{side} tokens": prompt + len(ids) for side, ids in answers.items()}
