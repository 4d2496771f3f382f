"""Export of votes for other programs, and import of votes from another machine."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from align.arena.votes import SIDES, VoteRow, VoteStore, checked_vote, read_votes
from align.data import load_records
from align.data.catalog import VoteDataset
from align.data.containers.data_files import DataFile
from align.data.convert import to_trl
from align.data.load import read_row
from align.data.row_errors import BadRow, BadRows, RawRow, RowError, RowSkipped
from align.data.sources import read_path
from align.data.vote_filter import VoteFilter, time_of_vote, vote_identity
from align.errors import DataError

COLUMNS = (
    "id", "time", "mode", "voter", "choice", "model_a", "model_b", "prompt", "answer_a", "answer_b", "reason", "tags",
    "truncated", "turn", "seed", "score_a", "score_b",
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def export_jsonl(source: Path, vote_filter: VoteFilter) -> Iterable[str]:
    """Yield votes as they are stored, one JSON line each."""
    return (json.dumps(row, ensure_ascii=False) for row in read_votes(source, vote_filter=vote_filter))


def export_pairs(source: Path, vote_filter: VoteFilter) -> Iterable[str]:
    """Yield the preference pairs in TRL's columns; what is no pair to train on is left out and counted on stderr."""
    spec = f"{source}:format=votes{f',{vote_filter}' if vote_filter.vote_settings else ''}"
    data = load_records(spec, view="preference")
    for reason, count in data.dropped.items():
        sys.stderr.write(f"left out {count}: {reason}\n")
    return (json.dumps(to_trl(record), ensure_ascii=False, default=str) for record in data.records)


def export_csv(source: Path, vote_filter: VoteFilter) -> Iterable[str]:
    """Yield the lines of a CSV table; a text that a spreadsheet would run as a formula starts with an apostrophe."""
    yield _csv_line(COLUMNS)
    for row in read_votes(source, vote_filter=vote_filter):
        models, scores = row.get("models") or {}, row.get("scores") or {}
        cells = {key: row.get(key, "") for key in COLUMNS}
        cells |= {"prompt": _conversation_text(row["prompt"]), "tags": ", ".join(row.get("tags", []))}
        for side in SIDES:
            cells[f"model_{side}"], cells[f"score_{side}"] = models.get(side, ""), scores.get(side, "")
            cells[f"answer_{side}"] = _conversation_text(row[side])
        for key, value in cells.items():
            if isinstance(value, str) and value.startswith(_FORMULA):
                cells[key] = f"'{value}"
        yield _csv_line(cells.values())


FORMATS: dict[str, Callable[[Path, VoteFilter], Iterable[str]]] = {
    "jsonl": export_jsonl,
    "trl": export_pairs,
    "csv": export_csv,
}


def import_votes(file: Path, store: VoteStore) -> tuple[int, int]:
    """Add the votes of a file to the store's folder; returns the numbers of new votes and of votes already stored.

    Raises DataError, and adds none, when a line is no vote or its id is that of another vote.
    """
    identities = {str(row.get("id")): vote_identity(row) for row in read_votes(store.path.parent)}
    new_rows: list[VoteRow] = []
    bad = BadRows()
    total = 0
    for raw in read_path(DataFile(file, str(file), appended=True)):
        total += 1
        try:
            row = _check_vote(raw)
            stored_identity = identities.get(row["id"])
            if stored_identity not in (None, vote_identity(row)):
                raise RowError("id taken", "id", f"{row['id']} is another vote", "remove one of the two")
        except RowError as error:
            bad.add(BadRow(f"{raw.source}:{raw.line}", error, raw.value))
            continue
        if stored_identity is None:
            new_rows.append(row)
            identities[row["id"]] = vote_identity(row)
    if count := bad.reasons.total():
        listed = "".join(f"\n  {line}" for line in bad.lines())
        raise DataError(f"{file}: {count} of {total} lines are no votes; none was imported, correct them first{listed}")
    if new_rows:
        store.append(new_rows)
    return len(new_rows), total - len(new_rows)


def _check_vote(raw: RawRow) -> VoteRow:
    """Return the row if it has the fields of a vote and an id and time."""
    row = checked_vote(raw.value)
    needs = {"id": isinstance(row.get("id"), str) and row["id"], "time": time_of_vote(row) is not None}
    if field := next((field for field, good in needs.items() if not good), None):
        raise RowError(f"no {field}", field, "is missing or not what a vote has", "export it anew, or remove the row")
    with contextlib.suppress(RowSkipped):  # a vote, though no pair to train on
        read_row(row, "votes", VoteDataset(source="votes").row_layout("votes", "preference"))
    return row


def _conversation_text(messages: Any) -> str:
    turns = [{"role": "", "content": messages}] if isinstance(messages, str) else messages
    alone = len(turns) == 1
    return "\n\n".join(turn["content"] if alone else f"{turn['role']}: {turn['content']}" for turn in turns)


def _csv_line(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().removesuffix("\n")
