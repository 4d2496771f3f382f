"""Telling the format of a dataset from its first rows, and saying why; or refusing, with a draft of its YAML."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from align.data.formats import recognise
from align.data.formats.column_names import CONVERSATIONS, OUTPUTS, PAIRS
from align.errors import DataError

Row = dict[str, Any]

SAMPLE_ROWS = 20
"""How many rows decide."""
_DECISIVE = {
    *CONVERSATIONS[:3],
    *PAIRS[0],
    *PAIRS[2],
    *OUTPUTS,
    "instruction",
    "prompt",
    "question",
    "label",
    "rejected_response",
}
_PROMPT_WORDS = (
    *("prompt", "question", "query", "ask", "instruction", "input", "user", "human", "request", "source"),
    *("title", "q"),
)
_ANSWER_WORDS = (
    *("completion", "answer", "response", "reply", "output", "assistant", "bot", "target", "solution", "summary"),
    *("result", "a"),
)
_GOOD_WORDS = ("chosen", "preferred", "better", "accepted", "win", "good", "positive")
_BAD_WORDS = ("rejected", "dispreferred", "worse", "lose", "bad", "negative")
_ROLE_WORDS = ("role", "from", "speaker", "author", "sender", "who", "type", "name")


def detect_format(
    rows: list[Row], name: str, columns: Mapping[str, str | list[str]] | None = None, source: str = ""
) -> tuple[str, str]:
    """Return format and reason by the majority of some rows; `columns` says which of them play which part.

    Raises DataError when fewer than half of them are recognised, or when a column is nearly called like one that
    would have decided otherwise.
    """
    renamed = [_name_by_part(row, columns) for row in rows] if columns else rows
    verdicts = Counter(verdict for row in renamed if (verdict := recognise(row)))
    listed = ", ".join(map(str, renamed[0])) if renamed else "none"
    remedy = "write a dataset YAML with `format:` and `columns:` (see datasets_cfg/)"
    misspelt = _misspelt_column(renamed)
    if not verdicts or verdicts.total() * 2 < len(renamed):
        hint = f"did you mean {misspelt[1]} by {misspelt[0]}? Or " if misspelt else ""
        raise DataError(
            f"{name}: the format cannot be told from the columns {listed}; {hint}{remedy}, "
            f"{draft_yaml(rows, source or name)}"
        )
    if misspelt:
        raise DataError(
            f"{name}: the column {misspelt[0]!r} is nearly called {misspelt[1]!r}, which would decide the format; "
            f"rename it, or say what it is: {remedy}"
        )
    return verdicts.most_common(1)[0][0]


def _name_by_part(row: Row, columns: Mapping[str, str | list[str]]) -> Row:
    """Return a row in which the columns that were said to play a part are called by it."""
    parts = {column: part for part, column in columns.items() if isinstance(column, str) and column in row}
    renamed = {part: row[column] for column, part in parts.items()}
    return renamed | {key: value for key, value in row.items() if key not in parts and key not in renamed}


def _misspelt_column(rows: list[Row]) -> tuple[str, str] | None:
    """Return a column and the decisive one it nearly is, unless the rows have that one, too."""
    names = {str(key): None for row in rows for key in row}
    for name in names:
        near = find_misspelt(name, _DECISIVE)
        if near is not None and near not in names and name.rstrip("0123456789_") not in _DECISIVE:
            return name, near
    return None


def find_misspelt(column: str, names: Iterable[str]) -> str | None:
    """Return the name that a column is a mistyped form of, and not its plural or a longer name of its own."""
    near = difflib.get_close_matches(column, names, 1, cutoff=0.8)
    if not near or column in (near[0], near[0] + "s") or column + "s" == near[0]:
        return None
    return near[0] if abs(len(column) - len(near[0])) <= 1 else None


def draft_yaml(rows: list[Row], name: str) -> str:
    """Return a YAML with the likely parts filled in, and the same for the command line where that can be."""
    format_name, columns, tags = _guess_parts(rows)
    listed = "".join(f"    {part}: {column}\n" for part, column in columns.items())
    tagged = "".join(f"    {tag}: {key}\n" for tag, key in tags.items())
    lines = f"  source: {name}\n  format: {format_name}\n  columns:\n{listed}" + (f"  tags:\n{tagged}" if tags else "")
    plain = not tags and all(re.fullmatch(r"[^,:=\s]+", column) for column in columns.values())
    spec = ",".join(f"{part}={column}" for part, column in columns.items())
    short = f"or say data={name}:format={format_name},{spec}" if plain else "then data=THAT.yaml"
    return f"a YAML to begin with (check what plays which part):\n{lines}  # {short}"


def _guess_parts(rows: list[Row]) -> tuple[str, dict[str, str], dict[str, str]]:
    """Return format, columns and tags that may fit some rows."""
    for column, value in _first_values(rows).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "messages", {"messages": column}, _guess_tags(value)
    texts = _text_columns(rows)
    good, bad = _column_with_word(texts, _GOOD_WORDS), _column_with_word(texts, _BAD_WORDS)
    if good and bad:
        prompt = _column_with_word([text for text in texts if text not in (good, bad)], _PROMPT_WORDS)
        return "preference", ({"prompt": prompt} if prompt else {}) | {"chosen": good, "rejected": bad}, {}
    answer = _column_with_word(texts, _ANSWER_WORDS)
    prompt = _column_with_word([text for text in texts if text != answer], _PROMPT_WORDS)
    left = [text for text in texts if text not in (prompt, answer)]
    prompt = prompt or (left.pop(0) if left and (answer or len(left) > 1) else None)
    answer = answer or (left.pop() if left and prompt else None)
    if prompt and answer:
        return "prompt_completion", {"prompt": prompt, "completion": answer}, {}
    return "text", {"text": prompt or answer or (left or texts or list(_first_values(rows)) or ["COLUMN"])[0]}, {}


def _first_values(rows: list[Row]) -> dict[str, Any]:
    """Return the first value of every column that is not empty."""
    values: dict[str, Any] = {}
    for row in rows:
        for column, value in row.items():
            if value not in (None, "", []):
                values.setdefault(str(column), value)
    return values


def _text_columns(rows: list[Row]) -> list[str]:
    """Return the columns of text that holds sentences: not numbers, nor ids of one word."""
    texts = [column for column, value in _first_values(rows).items() if isinstance(value, str)]
    words = (*_PROMPT_WORDS, *_ANSWER_WORDS, *_GOOD_WORDS, *_BAD_WORDS)
    sentences = {text for text in texts if any(" " in str(row.get(text, "")).strip() for row in rows)}
    return [text for text in texts if text in sentences or _column_with_word([text], words)] or texts


def _column_with_word(columns: list[str], words: tuple[str, ...]) -> str | None:
    """Return the column whose name holds the first of some words, as a word of its own."""
    for word in words:
        for column in columns:
            if word in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()):
                return column
    return None


def _guess_tags(turns: list[Any]) -> dict[str, str]:
    keys = [str(key) for key in turns[0]]
    role = next((key for word in _ROLE_WORDS for key in keys if key.lower() == word), keys[0])
    texts = [key for key in keys if key != role and isinstance(turns[0][key], str)]
    content = max(texts, key=lambda key: len(turns[0][key]), default=keys[-1])
    return {"role": role, "content": content}
