"""Export of votes for other programs, or of one comparison as an HTML file to send; import from another machine.

The HTML file holds prompt, answers, models and the vote. It is made from votes, so it cannot reveal anything before the
vote. It has no script and makes no request; texts are escaped, and control characters that hide text or change its
direction are made visible.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from align.arena.battle_view import render_word_differences
from align.arena.page_text import PAGE_TEXTS, Words, vote_key
from align.arena.votes import LETTERS, SIDES, TAGS, VoteRow, VoteStore, checked_vote, read_votes
from align.data import load_records
from align.data.catalog import VoteDataset
from align.data.containers.data_files import DataFile
from align.data.convert import to_trl
from align.data.load import read_row
from align.data.row_errors import BadRow, BadRows, RawRow, RowError, RowSkipped
from align.data.sources import read_path
from align.data.vote_filter import VoteFilter, time_of_vote, vote_identity
from align.errors import DataError, UsageError
from align.schema import Messages, assistant, user

COLUMNS = (
    "id", "time", "mode", "voter", "choice", "model_a", "model_b", "prompt", "answer_a", "answer_b", "reason", "tags",
    "truncated", "turn", "seed", "score_a", "score_b",
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = (Path(__file__).parent / "battle_file.css").read_text(encoding="utf-8")


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


@dataclass
class _Side:
    """One model's part in a comparison."""

    model: str
    digest: str
    turns: Messages
    score: float | None


def select_battle_rows(rows: Sequence[VoteRow], battle: str) -> list[VoteRow]:
    """Return the votes of one comparison by (the beginning of) its id, the id of a vote, or `last`.

    Raises UsageError when there is none, or more than one.
    """
    if battle == "last":
        battle = _battle_id(rows[-1]) if rows else battle
    battles = {
        _battle_id(row): None for row in rows if str(row.get("id")).startswith(battle) or _battle_id(row) == battle
    }
    if len(battles) != 1:
        details = f"{len(battles)} comparisons begin with it; give more of the id" if battles else "no vote has this id"
        raise UsageError(f"--battle {battle}: {details} (`--format csv` lists them; `last` is the last)")
    return [row for row in rows if _battle_id(row) in battles]


def _battle_id(row: VoteRow) -> str:
    return str(row.get("battle") or row.get("id"))


def render_battle_file(rows: Sequence[VoteRow], language: str) -> str:
    """Return the HTML of one comparison from its votes: one for two answers, more for more."""
    words, row = PAGE_TEXTS[language], rows[0]
    sides = _read_sides(rows)
    preferred = row["models"].get(row["choice"])
    if preferred is None:
        decision = words[vote_key(row["choice"], len(sides))]
    else:
        letter = next(LETTERS[index].upper() for index, side in sides.items() if side.model == preferred)
        decision = words["file_preferred"].format(letter=letter, model=preferred)
    last_answers = [_visible(sides[index].turns[-1]["content"]) for index in sorted(sides)]
    difference = ""
    if len(last_answers) == 2:
        boxes = "".join(render_word_differences(last_answers, words))
        difference = f'<h2>{_escape(words["difference_title"])}</h2><div class="panes">{boxes}</div>'
    body = [
        f"<h1>{_escape(decision)}</h1><small>{_escape(str(row.get('time', '')))}</small>",
        f"<h2>{_escape(words['file_asked'])}</h2>",
        f'<div class="shared">{"".join(_turn_html(turn, words) for turn in _turns(row["prompt"], user))}</div>',
        f"<h2>{_escape(words['file_answers'])}</h2>",
        f'<div class="panes">{"".join(_pane(index, sides[index], preferred, words) for index in sorted(sides))}</div>',
        f"{difference}<h2>{_escape(words['file_how'])}</h2><dl>{''.join(_facts_html(row, words))}</dl>",
    ]
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_escape(decision)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def _visible(text: str) -> str:
    return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _escape(text: str) -> str:
    return escape(_visible(text))


def _turns(turns: Any, make_message: Any) -> Messages:
    return [make_message(turns)] if isinstance(turns, str) else turns


def _read_sides(rows: Iterable[VoteRow]) -> dict[int, _Side]:
    sides = {}
    for row in rows:
        for index, side in enumerate("ab"):
            index = (row.get("sides") or {}).get(side, index)
            digest = (row.get("digests") or {}).get(side) or ""
            score = (row.get("scores") or {}).get(side)
            sides[index] = _Side(row["models"][side], digest, _turns(row[side], assistant), score)
    return sides


def _pane(index: int, side: _Side, preferred: str | None, words: Words) -> str:
    kind = ' class="preferred"' if side.model == preferred else ""
    details = [side.digest.removeprefix("sha256:")[:12]]
    details += [] if side.score is None else [words["reward"].format(score=side.score)]
    turns = "".join(_turn_html(turn, words) for turn in side.turns)
    return (
        f"<article{kind}><h3>{LETTERS[index].upper()} · {_escape(side.model)} "
        f"<small>{_escape(' · '.join(filter(None, details)))}</small></h3>{turns}</article>"
    )


def _turn_html(turn: Any, words: Words) -> str:
    labels = {"user": words["file_user"], "assistant": "", "system": words["system"]}
    label = labels.get(turn["role"], turn["role"])
    name = f"<b>{_escape(label)}</b>" if label else ""
    return f'<div class="said">{name}<p>{_escape(turn["content"])}</p></div>'


def _facts_html(row: VoteRow, words: Words) -> Iterable[str]:
    sampling = row.get("sampling") or {}
    numbers = (key for key in _SAMPLING if isinstance(sampling.get(key), int | float))
    tags = [words[f"tag_{tag}"] if tag in TAGS else tag for tag in row.get("tags") or []]
    names = {"blind": words["file_blind"], "named": words["file_named"]}
    facts = {
        words["file_names"]: names.get(row.get("mode", ""), ""),
        words["file_voter"]: row.get("voter"),
        words["tags"]: ", ".join(tags),
        words["reason"]: row.get("reason"),
        words["seed"]: row.get("seed"),
        words["file_sampling"]: " · ".join(f"{words[key]} {sampling[key]:g}" for key in numbers),
        words["file_base"]: (row.get("base") or {}).get("reference"),
        words["file_early"]: words["saved_early"] if row.get("truncated") else "",
        "ID": row.get("battle") or row.get("id"),
        "align": row.get("app_version"),
    }
    return (
        f"<dt>{_escape(name)}</dt><dd>{_escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
