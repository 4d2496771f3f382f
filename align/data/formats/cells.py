"""Values that tables hold as text: JSON, and the Python lists that pandas and numpy write into their cells.

Nothing is evaluated. Text is read as a value only where it is one conversation, or where its column usually holds
lists or objects; every other text stays the text it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from align.data.formats.column_names import CONVERSATIONS
from align.data.row_errors import RowError
from align.errors import shorten

LONGEST_CELL = 4 << 20
"""Characters of a cell that is read as a Python value; a longer one is refused."""
_MAX_DEPTH = 60
_ROLES = ("role", "from", "speaker")
_STRUCTURED = {
    *CONVERSATIONS,
    *("answers", "choices", "functions", "history", "instances", "paragraphs", "qas", "tool_calls", "tools"),
}
_TEXTS = ("text", "content")
"""Columns of raw text, in which a document may well be JSON."""
_STARTS = ("[", "{", "a", " ", "\n")
_TURN = re.compile(r"\s*(?:array\()?\s*\[?\s*\{\s*['\"](?:role|from|speaker|content|value|text)['\"]\s*:")
_PYTHON_TURN = re.compile(r"\s*(?:array\()?\s*\[?\s*\{\s*'(?:role|from|speaker)'")
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
_DECISION = "cells hold the text of a list or object; they were read as what it says"


def unpack_row(row: dict[str, Any], decisions: Counter[str] | None = None) -> dict[str, Any]:
    """Return a row in which cells with the text of a conversation, or of a usual structure, hold that value.

    Raises RowError for the text of a conversation that cannot be read: it must not be trained on as text.
    """
    values: dict[str, Any] = {}
    for column, value in row.items():
        if column in _TEXTS:
            continue
        if type(value) is str:
            if value[:1] in _STARTS and (inner := _value_of_cell(value, str(column))) is not None:
                values[column] = inner
        elif type(value) is list and value and type(value[0]) is str and value[0][:1] == "{":
            items = [_value_of_cell(item, str(column)) if isinstance(item, str) else None for item in value]
            if all(isinstance(item, dict) for item in items):
                values[column] = items
    if not values:
        return row
    if decisions is not None:
        decisions[_DECISION] += len(values)
    return row | values


def _value_of_cell(text: str, column: str) -> Any:
    if column in _STRUCTURED and text.lstrip()[:1] in ("[", "{", "a"):
        value = parse_value(text)
        if isinstance(value, (list, dict)):
            return value
    return parse_turns(text, column)


def parse_turns(text: str, column: str) -> list[Any] | dict[str, Any] | None:
    """Return the turn, or the list of turns, that a text is; None when it is something else.

    Raises RowError for a text that begins as turns do and cannot be read.
    """
    if not _TURN.match(text) or text.rstrip()[-1:] not in ("]", "}", ")"):
        return None
    value = parse_value(text)
    turns = value if isinstance(value, list) else [value]
    if value and all(isinstance(turn, dict) and any(role in turn for role in _ROLES) for turn in turns):
        return value
    if value is None and _PYTHON_TURN.match(text):
        problem = f"holds the text of a Python list that cannot be read ({shorten(text, 40)})"
        raise RowError("not messages", column, problem, "write the cells as JSON, such as with json.dumps")
    return None


def parse_value(text: str) -> Any:
    """Return the value of a text of JSON or of a Python literal; None when it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > LONGEST_CELL:
        return None
    try:
        return _LiteralParser(text).parse()
    except (ValueError, SyntaxError):
        return None


class _LiteralParser:
    """A parser of Python lists, objects, texts and numbers, also as numpy prints them (without commas); bounded.

    `ast.literal_eval` reads neither numpy's spelling nor text of any depth without risk to the interpreter.
    """

    def __init__(self, text: str) -> None:
        self._tokens = self._split(text.strip())
        self._next = next(self._tokens, ("end", ""))

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None:
                raise ValueError(f"no value at character {position}")
            yield token.lastgroup or "", token[token.lastgroup or 0]
            position = token.end()

    def parse(self) -> Any:
        """Return the value; ValueError when something follows it."""
        value = self._value(0)
        if self._next[0] != "end":
            raise ValueError("more follows the value")
        return value

    def _take(self) -> tuple[str, str]:
        token, self._next = self._next, next(self._tokens, ("end", ""))
        return token

    def _take_sign(self, sign: str) -> bool:
        matches = self._next == ("sign", sign)
        if matches:
            self._take()
        return matches

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
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
        while not self._take_sign(end):
            items.append(self._value(depth + 1))
            self._take_sign(",")
        return items

    def _object(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not self._take_sign("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str) or key in values or not self._take_sign(":"):
                raise ValueError("no key of an object")
            values[key] = self._value(depth + 1)
            self._take_sign(",")
        return values

    def _array(self, depth: int) -> Any:
        value = self._value(depth + 1)
        if self._take_sign(","):
            kind, text = self._take()
            if kind != "word" or not text.startswith("dtype="):
                raise ValueError("no array")
        if not self._take_sign(")"):
            raise ValueError("no array")
        return value
