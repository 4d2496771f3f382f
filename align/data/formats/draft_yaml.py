"""A first draft of a dataset's YAML for rows whose format cannot be told: which column may play which part."""

from __future__ import annotations

import re
from typing import Any

Row = dict[str, Any]

_ASKS = (
    "prompt",
    "question",
    "query",
    "ask",
    "instruction",
    "input",
    "user",
    "human",
    "request",
    "source",
    "title",
    "q",
)
_ANSWERS = (
    *("completion", "answer", "response", "reply", "output", "assistant", "bot", "target", "solution", "summary"),
    *("result", "a"),
)
_GOOD = ("chosen", "preferred", "better", "accepted", "win", "good", "positive")
_BAD = ("rejected", "dispreferred", "worse", "lose", "bad", "negative")
_ROLES = ("role", "from", "speaker", "author", "sender", "who", "type", "name")


def draft(rows: list[Row], name: str) -> str:
    """Return the text of a YAML with the likely parts filled in, and the same on the command line where that can be."""
    format_name, columns, tags = _guess(rows)
    listed = "".join(f"    {part}: {column}\n" for part, column in columns.items())
    tagged = "".join(f"    {tag}: {key}\n" for tag, key in tags.items())
    lines = f"  source: {name}\n  format: {format_name}\n  columns:\n{listed}" + (f"  tags:\n{tagged}" if tags else "")
    plain = not tags and all(re.fullmatch(r"[^,:=\s]+", column) for column in columns.values())
    spec = ",".join(f"{part}={column}" for part, column in columns.items())
    short = f"or say data={name}:format={format_name},{spec}" if plain else "then data=THAT.yaml"
    return f"a YAML to begin with (check what plays which part):\n{lines}  # {short}"


def _guess(rows: list[Row]) -> tuple[str, dict[str, str], dict[str, str]]:
    for column, value in _first_values(rows).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "messages", {"messages": column}, _turn_keys(value)
    texts = _text_columns(rows)
    good, bad = _named(texts, _GOOD), _named(texts, _BAD)
    if good and bad:
        asked = _named([text for text in texts if text not in (good, bad)], _ASKS)
        return "preference", ({"prompt": asked} if asked else {}) | {"chosen": good, "rejected": bad}, {}
    answer = _named(texts, _ANSWERS)
    asked = _named([text for text in texts if text != answer], _ASKS)
    left = [text for text in texts if text not in (asked, answer)]
    asked = asked or (left.pop(0) if left and (answer or len(left) > 1) else None)
    answer = answer or (left.pop() if left and asked else None)
    if asked and answer:
        return "prompt_completion", {"prompt": asked, "completion": answer}, {}
    return "text", {"text": asked or answer or (left or texts or list(_first_values(rows)) or ["COLUMN"])[0]}, {}


def _first_values(rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        for column, value in row.items():
            if value not in (None, "", []):
                found.setdefault(str(column), value)
    return found


def _text_columns(rows: list[Row]) -> list[str]:
    """Columns of text that says something: not numbers, nor ids of one word."""
    texts = [column for column, value in _first_values(rows).items() if isinstance(value, str)]
    said = [text for text in texts if any(" " in str(row.get(text, "")).strip() for row in rows)]
    named = [text for text in texts if _named([text], (*_ASKS, *_ANSWERS, *_GOOD, *_BAD)) and text not in said]
    return [text for text in texts if text in said or text in named] or texts


def _named(columns: list[str], words: tuple[str, ...]) -> str | None:
    """The column whose name holds the first of some words, as a word of its own."""
    for word in words:
        for column in columns:
            if word in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()):
                return column
    return None


def _turn_keys(turns: list[Any]) -> dict[str, str]:
    keys = [str(key) for key in turns[0]]
    role = next((key for known in _ROLES for key in keys if key.lower() == known), keys[0])
    texts = [key for key in keys if key != role and isinstance(turns[0][key], str)]
    content = max(texts, key=lambda key: len(turns[0][key]), default=keys[-1])
    return {"role": role, "content": content}
