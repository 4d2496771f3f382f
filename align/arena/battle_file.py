"""One comparison as an HTML file to pass on: who answered what, and what was decided.

It is made of votes, so nothing of it exists before the vote. It runs no script and asks no other machine for anything;
texts of models and voters are escaped, and characters that would hide or turn round what is written are made visible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from align.arena.page_text import PAGE_TEXTS, vote_key
from align.arena.vote_details import LETTERS, TAGS
from align.arena.votes import Row
from align.arena.word_difference import render_word_differences
from align.errors import UsageError
from align.schema import Messages, assistant, user

Words = dict[str, str]

_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = (Path(__file__).parent / "battle_file.css").read_text(encoding="utf-8")


@dataclass
class _Side:
    """What one model did in a comparison."""

    model: str
    digest: str
    turns: Messages
    score: float | None


def rows_of(rows: Sequence[Row], battle: str) -> list[Row]:
    """The votes of one comparison: by its id or the beginning of it, by the id of a vote, or of the `last` one.

    Raises UsageError when there is none, or more than one.
    """
    if battle == "last":
        battle = _battle_of(rows[-1]) if rows else battle
    found = {
        _battle_of(row): None for row in rows if str(row.get("id")).startswith(battle) or _battle_of(row) == battle
    }
    if len(found) != 1:
        told = f"{len(found)} comparisons begin with it; give more of the id" if found else "no vote has this id"
        raise UsageError(f"--battle {battle}: {told} (`--format csv` lists them; `last` is the last)")
    return [row for row in rows if _battle_of(row) in found]


def _battle_of(row: Row) -> str:
    return str(row.get("battle") or row.get("id"))


def battle_file(rows: Sequence[Row], language: str) -> str:
    """The page of the votes of one comparison, which are one for two answers and more for more."""
    words, row = PAGE_TEXTS[language], rows[0]
    sides = _sides(rows)
    decision = _decision(rows, sides, words)
    body = [
        f"<h1>{_shown(decision)}</h1><small>{_shown(str(row.get('time', '')))}</small>",
        f"<h2>{_shown(words['file_asked'])}</h2>",
        f'<div class="shared">{"".join(_said(turn, words) for turn in _turns(row["prompt"], user))}</div>',
        f"<h2>{_shown(words['file_answers'])}</h2>",
        f'<div class="panes">{"".join(_pane(place, sides[place], rows, words) for place in sorted(sides))}</div>',
        *_difference(sides, words),
        f"<h2>{_shown(words['file_how'])}</h2><dl>{''.join(_facts(row, words))}</dl>",
    ]
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_shown(decision)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def _shown(text: str) -> str:
    return escape(_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text))


def _turns(said: Any, speaker: Any) -> Messages:
    return [speaker(said)] if isinstance(said, str) else said


def _sides(rows: Iterable[Row]) -> dict[int, _Side]:
    sides = {}
    for row in rows:
        for index, side in enumerate("ab"):
            place = (row.get("sides") or {}).get(side, index)
            digest = (row.get("digests") or {}).get(side) or ""
            score = (row.get("scores") or {}).get(side)
            sides[place] = _Side(row["models"][side], digest, _turns(row[side], assistant), score)
    return sides


def _preferred(row: Row) -> str | None:
    preferred: str | None = row["models"].get(row["choice"])
    return preferred


def _decision(rows: Sequence[Row], sides: dict[int, _Side], words: Words) -> str:
    model = _preferred(rows[0])
    if model is None:
        return words[vote_key(rows[0]["choice"], len(sides))]
    [place] = [place for place, side in sides.items() if side.model == model][:1]
    return words["file_preferred"].format(letter=LETTERS[place].upper(), model=model)


def _pane(place: int, side: _Side, rows: Sequence[Row], words: Words) -> str:
    kind = ' class="preferred"' if side.model == _preferred(rows[0]) else ""
    told = [side.digest.removeprefix("sha256:")[:12]]
    told += [] if side.score is None else [words["reward"].format(score=side.score)]
    said = "".join(_said(turn, words) for turn in side.turns)
    return (
        f"<article{kind}><h3>{LETTERS[place].upper()} · {_shown(side.model)} "
        f"<small>{_shown(' · '.join(filter(None, told)))}</small></h3>{said}</article>"
    )


def _said(turn: Any, words: Words) -> str:
    speaker = {"user": words["file_user"], "assistant": "", "system": words["system"]}.get(turn["role"], turn["role"])
    name = f"<b>{_shown(speaker)}</b>" if speaker else ""
    return f'<div class="said">{name}<p>{_shown(turn["content"])}</p></div>'


def _difference(sides: dict[int, _Side], words: Words) -> list[str]:
    answers = [_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", sides[place].turns[-1]["content"]) for place in sorted(sides)]
    if len(answers) != 2:
        return []
    boxes = "".join(render_word_differences(answers, words))
    return [f"<h2>{_shown(words['difference_title'])}</h2>", f'<div class="panes">{boxes}</div>']


def _facts(row: Row, words: Words) -> Iterable[str]:
    sampling = row.get("sampling") or {}
    drawn = [f"{words[key]} {sampling[key]:g}" for key in _SAMPLING if isinstance(sampling.get(key), int | float)]
    tags = [words[f"tag_{tag}"] if tag in TAGS else tag for tag in row.get("tags") or []]
    names = {"blind": words["file_blind"], "named": words["file_named"]}
    facts = {
        words["file_names"]: names.get(row.get("mode", ""), ""),
        words["file_voter"]: row.get("voter"),
        words["tags"]: ", ".join(tags),
        words["reason"]: row.get("reason"),
        words["seed"]: row.get("seed"),
        words["file_sampling"]: " · ".join(drawn),
        words["file_base"]: (row.get("base") or {}).get("reference"),
        words["file_early"]: words["saved_early"] if row.get("truncated") else "",
        "ID": row.get("battle") or row.get("id"),
        "align": row.get("app_version"),
    }
    return (
        f"<dt>{_shown(name)}</dt><dd>{_shown(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
