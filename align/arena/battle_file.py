"""One comparison as an HTML file to send: prompt, answers, models and the vote.

It is made from votes, so it cannot reveal anything before the vote. It has no script and makes no request; texts are
escaped, and control characters that hide text or change its direction are made visible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from align.arena.battle_view import render_word_differences
from align.arena.page_text import PAGE_TEXTS, Words, vote_key
from align.arena.votes import LETTERS, TAGS, VoteRow
from align.errors import UsageError
from align.schema import Messages, assistant, user

_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = (Path(__file__).parent / "battle_file.css").read_text(encoding="utf-8")


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
    body = [
        f"<h1>{_escape(decision)}</h1><small>{_escape(str(row.get('time', '')))}</small>",
        f"<h2>{_escape(words['file_asked'])}</h2>",
        f'<div class="shared">{"".join(_turn_html(turn, words) for turn in _turns(row["prompt"], user))}</div>',
        f"<h2>{_escape(words['file_answers'])}</h2>",
        f'<div class="panes">{"".join(_pane(index, sides[index], preferred, words) for index in sorted(sides))}</div>',
        *_difference(sides, words),
        f"<h2>{_escape(words['file_how'])}</h2><dl>{''.join(_facts_html(row, words))}</dl>",
    ]
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_escape(decision)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def _escape(text: str) -> str:
    return escape(_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", text))


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


def _difference(sides: dict[int, _Side], words: Words) -> list[str]:
    answers = [_HIDDEN.sub("\N{REPLACEMENT CHARACTER}", sides[index].turns[-1]["content"]) for index in sorted(sides)]
    if len(answers) != 2:
        return []
    boxes = "".join(render_word_differences(answers, words))
    return [f"<h2>{_escape(words['difference_title'])}</h2>", f'<div class="panes">{boxes}</div>']


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
