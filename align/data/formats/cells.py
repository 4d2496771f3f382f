"""Values that tables hold as text: JSON, and the Python lists that pandas and numpy write into their cells.

Nothing is evaluated. Text is read as a value only where it is one conversation, or where its column usually holds
lists or objects; every other text stays the text it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from align.data.row_errors import RowError
from align.errors import shorten

CONVERSATIONS = ("messages", "conversations", "conversation", "utterances", "dialogue", "dialog", "turns")
"""Columns that hold a whole conversation."""
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
    |(?P<dtype>dtype=\w+)
    |(?P<open>array\(|[\[{(])
    |(?P<word>True|False|None|nan)
    |(?P<close>[\]})])
    |(?P<sign>[,:])
    )""",
    re.VERBOSE | re.DOTALL,
)


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
        decisions["cells hold the text of a list or object; they were read as that value"] += len(values)
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
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    with suppress(ValueError, SyntaxError):
        return None if len(text) > LONGEST_CELL else _parse_literal(text)
    return None


def _parse_literal(text: str) -> Any:
    """Return the value of a Python literal of lists, objects, texts and numbers, also as numpy prints it.

    It is rewritten token by token as JSON: `ast.literal_eval` reads neither lists without commas nor `array(...)`.
    """
    json_text: list[str] = []
    brackets: list[str] = []  # those that are open
    previous = ""  # value, a comma, or what a value must follow
    for kind, token in _split_tokens(text.strip()):
        misplaced = previous != "value" or not brackets
        if (token == "," and misplaced) or (kind == "dtype" and brackets[-1:] != ["array("]):
            raise ValueError(f"{token} is no value")
        if kind in ("open", "string", "number", "word") and previous in ("value", ","):
            json_text.append(",")
        if kind == "open":
            brackets.append(token)
            json_text.append({"(": "[", "array(": ""}.get(token, token))
        elif kind == "close":
            opened = brackets.pop() if brackets else ""
            if token != {"[": "]", "{": "}"}.get(opened, ")"):
                raise ValueError(f"{token} closes nothing")
            json_text.append({"{": "}", "array(": ""}.get(opened, "]"))
        elif token != "," and kind != "dtype":
            json_text.append(_JSON_OF[kind](token))
        previous = token if kind in ("open", "sign") else "value"
        if len(brackets) > _MAX_DEPTH:
            raise ValueError("nested too deeply")
    if brackets:
        raise ValueError(f"{brackets[-1]} is not closed")
    return json.loads("".join(json_text), object_pairs_hook=_unique_keys)


def _split_tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        if (token := _TOKEN.match(text, position)) is None:
            raise ValueError(f"no value at character {position}")
        yield token.lastgroup or "", token[token.lastgroup or 0]
        position = token.end()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) != len(pairs):
        raise ValueError("a key is written twice")
    return values


_JSON_OF: dict[str, Callable[[str], str]] = {
    "string": lambda token: json.dumps(ast.literal_eval(token)),  # one text in quotes, and nothing else
    "number": lambda token: repr(float(token) if set(token) & set(".eE") else int(token)),
    "word": {"True": "true", "False": "false", "None": "null", "nan": "null"}.__getitem__,
    "sign": str,
}
