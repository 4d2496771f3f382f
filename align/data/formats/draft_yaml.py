"""A first draft of a dataset's YAML for rows whose format is not recognised: which column may play which part."""

from __future__ import annotations

import re
from typing import Any

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


def draft_yaml(rows: list[dict[str, Any]], name: str) -> str:
    """Return a YAML with the likely parts filled in, and the same for the command line where that can be."""
    format_name, columns, tags = _guess_parts(rows)
    listed = "".join(f"    {part}: {column}\n" for part, column in columns.items())
    tagged = "".join(f"    {tag}: {key}\n" for tag, key in tags.items())
    lines = f"  source: {name}\n  format: {format_name}\n  columns:\n{listed}" + (f"  tags:\n{tagged}" if tags else "")
    plain = not tags and all(re.fullmatch(r"[^,:=\s]+", column) for column in columns.values())
    spec = ",".join(f"{part}={column}" for part, column in columns.items())
    short = f"or data={name}:format={format_name},{spec}" if plain else "then data=THAT.yaml"
    return f"a YAML to begin with (check what plays which part):\n{lines}  # {short}"


def _guess_parts(rows: list[dict[str, Any]]) -> tuple[str, dict[str, str], dict[str, str]]:
    """Return format, columns and tags that may fit some rows."""
    values: dict[str, Any] = {}  # the first one of every column
    for row in rows:
        found = {str(column): value for column, value in row.items() if value not in (None, "", [])}
        values |= {column: value for column, value in found.items() if column not in values}
    for column, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "messages", {"messages": column}, _guess_tags(value[0])
    texts = [column for column, value in values.items() if isinstance(value, str)]
    words = (*_PROMPT_WORDS, *_ANSWER_WORDS, *_GOOD_WORDS, *_BAD_WORDS)
    sentences = {text for text in texts if any(" " in str(row.get(text, "")).strip() for row in rows)}
    # Columns of sentences, not numbers, nor ids of one word.
    texts = [text for text in texts if text in sentences or _column_with_word([text], words)] or texts
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
    return "text", {"text": prompt or answer or (left or texts or list(values) or ["COLUMN"])[0]}, {}


def _column_with_word(columns: list[str], words: tuple[str, ...]) -> str | None:
    """Return the column whose name holds the first of some words, as a word of its own."""
    for word in words:
        for column in columns:
            if word in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()):
                return column
    return None


def _guess_tags(turn: dict[Any, Any]) -> dict[str, str]:
    keys = [str(key) for key in turn]
    role = next((key for word in _ROLE_WORDS for key in keys if key.lower() == word), keys[0])
    texts = [key for key in keys if key != role and isinstance(turn[key], str)]
    content = max(texts, key=lambda key: len(turn[key]), default=keys[-1])
    return {"role": role, "content": content}
