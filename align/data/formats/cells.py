"""Values that tables hold as text: JSON, and the Python lists that pandas and numpy write into their cells.

Nothing is evaluated. Text is read as a value only where it is one conversation, or where its column is known to hold
lists or objects; every other text stays the text it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from align.data.formats.detection import TALKS
from align.data.row_errors import RowError
from align.errors import shorten

LONGEST_CELL = 4 << 20
"""Characters of a cell that is read as a Python value; a longer one is refused."""
_DEEPEST = 60
_ROLES = ("role", "from", "speaker")
_STRUCTURED = {
    *TALKS,
    *("answers", "choices", "functions", "history", "instances", "paragraphs", "qas", "tool_calls", "tools"),
}
_TEXTS = ("text", "content")
"""Columns of raw text, in which a document may well be JSON."""
_STARTS = ("[", "{", "a", " ", "\n")
_TURN = re.compile(r"\s*(?:array\()?\s*\[?\s*\{\s*['\"](?:role|from|speaker|content|value|text)['\"]\s*:")
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<string>'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")
    |(?P<number>[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)
    |(?P<word>dtype=\w+|array\(|True|False|None|nan)
    |(?P<sign>[\[\]{}(),:])
    )""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"True": True, "False": False, "None": None, "nan": None}
_REMARK = "cells hold the text of a list or object; they were read as what it says"


def unpack_row(row: dict[str, Any], remarks: Counter[str] | None = None) -> dict[str, Any]:
    """Return a row whose cells of text that is a conversation, or a known structure, are read as what they say.

    Raises RowError for the text of a conversation that cannot be read: it must not be trained on as text.
    """
    found: dict[str, Any] = {}
    for column, value in row.items():
        if column in _TEXTS:
            continue
        if type(value) is str:
            if value[:1] in _STARTS and (inner := _of_text(value, str(column))) is not None:
                found[column] = inner
        elif type(value) is list and value and type(value[0]) is str and value[0][:1] == "{":
            items = [_of_text(item, str(column)) if isinstance(item, str) else None for item in value]
            if all(isinstance(item, dict) for item in items):
                found[column] = items
    if not found:
        return row
    if remarks is not None:
        remarks[_REMARK] += len(found)
    return row | found


def _of_text(text: str, column: str) -> Any:
    if column in _STRUCTURED and text.lstrip()[:1] in ("[", "{", "a"):
        value = read_value(text)
        if isinstance(value, (list, dict)):
            return value
    return turns_of(text, column)


def turns_of(text: str, column: str) -> list[Any] | dict[str, Any] | None:
    """Return the turn, or the list of turns, that a text is; None when it is something else.

    Raises RowError for a text that begins as turns do and cannot be read.
    """
    if not _TURN.match(text) or text.rstrip()[-1:] not in ("]", "}", ")"):
        return None
    value = read_value(text)
    turns = value if isinstance(value, list) else [value]
    if value and all(isinstance(turn, dict) and any(role in turn for role in _ROLES) for turn in turns):
        return value
    if value is None and re.match(r"\s*(?:array\()?\s*\[?\s*\{\s*'(?:role|from|speaker)'", text):
        problem = f"holds the text of a Python list that cannot be read ({shorten(text, 40)})"
        raise RowError("not messages", column, problem, "write the cells as JSON, such as with json.dumps")
    return None


def read_value(text: str) -> Any:
    """Return the value that a text of JSON or of a Python literal says; None when it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > LONGEST_CELL:
        return None
    try:
        return _Literal(text).whole()
    except (ValueError, SyntaxError):
        return None


class _Literal:
    """A Python literal of lists, objects, texts and numbers, also as numpy prints it (without commas); bounded."""

    def __init__(self, text: str) -> None:
        self._tokens = self._split(text.strip())
        self._next = next(self._tokens, ("end", ""))

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        place = 0
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                raise ValueError(f"no value at character {place}")
            yield found.lastgroup or "", found[found.lastgroup or 0]
            place = found.end()

    def whole(self) -> Any:
        """The value; ValueError when something follows it."""
        value = self._value(0)
        if self._next[0] != "end":
            raise ValueError("more follows the value")
        return value

    def _take(self) -> tuple[str, str]:
        taken, self._next = self._next, next(self._tokens, ("end", ""))
        return taken

    def _took(self, sign: str) -> bool:
        found = self._next == ("sign", sign)
        if found:
            self._take()
        return found

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        kind, text = self._take()
        if kind == "string":
            return ast.literal_eval(text)  # one text in quotes, and nothing else
        if kind == "number":
            return float(text) if set(text) & set(".eE") else int(text)
        if kind == "word" and text in _WORDS:
            return _WORDS[text]
        if text == "array(":
            return self._array(depth)
        if text in ("[", "("):
            return self._items("]" if text == "[" else ")", depth)
        if text == "{":
            return self._object(depth)
        raise ValueError(f"{text!r} is no value")

    def _items(self, end: str, depth: int) -> list[Any]:
        items = []
        while not self._took(end):
            items.append(self._value(depth + 1))
            self._took(",")
        return items

    def _object(self, depth: int) -> dict[str, Any]:
        held: dict[str, Any] = {}
        while not self._took("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str) or key in held or not self._took(":"):
                raise ValueError("no key of an object")
            held[key] = self._value(depth + 1)
            self._took(",")
        return held

    def _array(self, depth: int) -> Any:
        value = self._value(depth + 1)
        if self._took(","):
            kind, text = self._take()
            if kind != "word" or not text.startswith("dtype="):
                raise ValueError("no array")
        if not self._took(")"):
            raise ValueError("no array")
        return value
