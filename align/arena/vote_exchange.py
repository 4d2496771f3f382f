"""Votes in and out of a registry: written for other programs, and merged from another machine."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from align.arena.votes import Row, VoteStore, checked_vote, read_votes
from align.data import load_records
from align.data.catalog import DatasetConfig, make_layout
from align.data.containers import RawRow, ReadOptions, read_path
from align.data.load import read_row
from align.data.row_errors import BadRow, RowError, RowSkipped, first_of_each_reason
from align.data.shapes import to_trl
from align.data.vote_filter import VoteFilter, describe_filter, time_of_vote, vote_identity
from align.errors import DataError

COLUMNS = (
    "id", "time", "mode", "voter", "choice", "model_a", "model_b", "prompt", "answer_a", "answer_b", "reason", "tags",
    "truncated", "turn", "seed", "score_a", "score_b",
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def votes_as_lines(source: Path, wanted: VoteFilter) -> Iterable[str]:
    """Votes as they are kept, one a line."""
    return (json.dumps(row, ensure_ascii=False) for row in read_votes(source, wanted=wanted))


def votes_as_pairs(source: Path, wanted: VoteFilter) -> Iterable[str]:
    """The pairs that can be learned from, in TRL's columns; ties, refusals and what taught nothing are left out."""
    options = describe_filter(wanted)
    found = load_records(f"{source}:format=votes{',' + options if options else ''}", view="preference")
    for reason, count in found.dropped.items():
        sys.stderr.write(f"left out {count}: {reason}\n")
    return (json.dumps(to_trl(record), ensure_ascii=False, default=str) for record in found.records)


def votes_as_table(source: Path, wanted: VoteFilter) -> Iterable[str]:
    """A CSV table, one vote a row; a text that a spreadsheet would run as a formula starts with an apostrophe."""
    yield _csv_line(COLUMNS)
    for row in read_votes(source, wanted=wanted):
        models, scores = row.get("models") or {}, row.get("scores") or {}
        plain = {key: row.get(key, "") for key in COLUMNS}
        plain |= {"model_a": models.get("a", ""), "model_b": models.get("b", "")}
        plain |= {
            "score_a": scores.get("a", ""),
            "score_b": scores.get("b", ""),
            "tags": ", ".join(row.get("tags", [])),
        }
        plain |= {"prompt": _talk(row["prompt"]), "answer_a": _talk(row["a"]), "answer_b": _talk(row["b"])}
        yield _csv_line([_harmless(plain[key]) for key in COLUMNS])


FORMATS: dict[str, Callable[[Path, VoteFilter], Iterable[str]]] = {
    "jsonl": votes_as_lines,
    "trl": votes_as_pairs,
    "csv": votes_as_table,
}


def import_votes(file: Path, store: VoteStore) -> tuple[int, int]:
    """Add the votes of a file to those beside the store; returns how many were new and how many were there already.

    Raises DataError, and adds none, when a line is no vote or its id stands for another vote.
    """
    here = {str(row.get("id")): vote_identity(row) for row in read_votes(store.path.parent)}
    fresh: dict[str, Row] = {}
    bad: list[BadRow] = []
    total = 0
    for raw in read_path(file, str(file), [], ReadOptions(appended=True)):
        total += 1
        try:
            row = _checked(raw)
            known = here.get(row["id"]) or (vote_identity(fresh[row["id"]]) if row["id"] in fresh else None)
            if known not in (None, vote_identity(row)):
                raise RowError("id taken", "id", f"{row['id']} is another vote", "remove one of the two")
        except RowError as error:
            bad.append(BadRow(f"{raw.source}:{raw.line}", error, raw.value))
            continue
        if known is None:
            fresh[row["id"]] = row
    if bad:
        listed = "".join(f"\n  {row}" for row in first_of_each_reason(bad))
        raise DataError(f"{file}: {len(bad)} of {total} lines are no votes; none was imported, mend them first{listed}")
    if fresh:
        store.append(fresh.values())
    return len(fresh), total - len(fresh)


def _checked(raw: RawRow) -> Row:
    """A row that has all a vote needs."""
    row = checked_vote(raw.value)
    needs = {"id": isinstance(row.get("id"), str) and row["id"], "time": time_of_vote(row) is not None}
    for field, good in needs.items():
        if not good:
            raise RowError(
                f"no {field}", field, "is missing or not what a vote has", "export it anew, or remove the row"
            )
    with contextlib.suppress(RowSkipped):  # a vote all the same, though no pair to learn from
        read_row(row, "votes", make_layout(DatasetConfig(source="votes"), "votes", "preference"))
    return row


def _talk(messages: Any) -> str:
    turns = [{"role": "", "content": messages}] if isinstance(messages, str) else messages
    alone = len(turns) == 1
    return "\n\n".join(turn["content"] if alone else f"{turn['role']}: {turn['content']}" for turn in turns)


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _csv_line(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().removesuffix("\n")
