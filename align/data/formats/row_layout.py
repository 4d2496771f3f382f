"""The layout of a dataset's rows: which column plays which part, and typed access to the parts."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from align.data.formats.turns import OPENAI_TAGS, Tags, checked_text, read_answer, read_context
from align.data.row_errors import RowError
from align.errors import nearest, shorten
from align.schema import Messages, View

Row = dict[str, Any]
Synonyms = Mapping[str, tuple[str, ...]]

COMMON: Synonyms = {part: (part,) for part in ("tools", "id", "weight", "margin", "score", "meta")}
"""Parts that every format knows."""
_LABELS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


class ColumnRoles(NamedTuple):
    """Which part each column of a kind of row plays."""

    columns: dict[str, str]
    """the column of every part the row has"""
    extras: tuple[tuple[str, str], ...]
    """weight, margin, score, tools, meta and id with their columns, as far as the row has them"""
    unused: tuple[str, ...]
    """the columns without a part"""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The columns, tags and policies a reader follows.

    `columns` maps a part to the column that plays it and wins over `synonyms`, the spellings a format knows by itself.
    """

    synonyms: Synonyms
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    tags: Tags = OPENAI_TAGS
    view: View | None = None
    label_map: Mapping[str, str | bool] = field(default_factory=dict)
    ties: str = "drop"
    labels: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    truncated: str = "drop"
    both_bad: str = "unpaired"
    default_system: str = ""
    decisions: Counter[str] = field(default_factory=Counter)
    """decisions about rows that were read, with how often each was taken"""
    _roles: dict[tuple[str, ...], ColumnRoles] = field(default_factory=dict)
    _last: list[Any] = field(default_factory=list)

    def roles(self, row: Row) -> ColumnRoles:
        """Return the roles of a row's columns; rows with the same columns share them."""
        if self._last and self._last[0] is row:  # readers ask for one part of a row after the other
            return self._last[1]
        keys = tuple(row)
        roles = self._roles.get(keys)
        if roles is None:
            if len(self._roles) >= 1000:  # rows whose keys are data, such as names
                self._roles.clear()
            roles = self._roles[keys] = self._assign_roles(row)
        self._last[:] = (row, roles)
        return roles

    def _assign_roles(self, row: Row) -> ColumnRoles:
        given = {part: (column,) for part, column in self.columns.items() if isinstance(column, str)}
        present = {part: [name for name in names if name in row] for part, names in {**self.synonyms, **given}.items()}
        columns = {part: names[0] for part, names in present.items() if names}
        named = {name for value in self.columns.values() for name in ([value] if isinstance(value, str) else value)}
        # A column with a part's usual name that was not taken for it counts as unused.
        used = {*columns.values(), *named}
        extras = tuple((part, columns[part]) for part in COMMON if part in columns)
        return ColumnRoles(columns, extras, tuple(key for key in row if key not in used))

    def column(self, row: Row, part: str) -> str | None:
        """Return the name of the column that plays this part in this row, if any."""
        return self.roles(row).columns.get(part)

    def get(self, row: Row, part: str) -> Any:
        """Return the value of an optional part; None when absent, null or (as tables write it) empty."""
        column = self.column(row, part)
        value = row[column] if column is not None else None
        return None if value == "" else value

    def reference(self, row: Row) -> str | None:
        """Return the answer to check a completion against, where there is one."""
        value = self.get(row, "answer")
        return None if value is None else str(value)

    def need(self, row: Row, part: str) -> tuple[str, Any]:
        """Return name and value of a part every row must have."""
        column = self.column(row, part)
        if column is None:
            named = self.columns.get(part)
            wanted = named if isinstance(named, str) else (self.synonyms.get(part) or (part,))[0]
            hint = nearest(wanted, row)
            remedy = f"rename it or write `columns: {{{part}: ...}}`{';' if hint else ''}{hint}"
            raise RowError("missing column", wanted, f"no such column (columns: {', '.join(row) or 'none'})", remedy)
        return column, row[column]

    def text(self, row: Row, part: str, empty: str | None) -> str:
        """Return a text every row must have; blank is refused under the reason `empty`, unless that is None."""
        column, value = self.need(row, part)
        return checked_text(value, column, empty)

    def context(self, row: Row, part: str) -> Messages:
        """Return the turns of a prompt every row must have."""
        column, value = self.need(row, part)
        return read_context(value, column, self.tags)

    def answer(self, row: Row, part: str) -> Messages:
        """Return the turns of an answer every row must have."""
        column, value = self.need(row, part)
        return read_answer(value, column, self.tags)

    def optional_text(self, row: Row, part: str) -> str | None:
        """Return a text that may be absent, null or blank."""
        if (value := self.get(row, part)) is None:
            return None
        text = checked_text(value, self.column(row, part) or part, None)
        return text if text.strip() else None

    def label(self, row: Row) -> bool | None:
        """Return the good-or-bad label, if any.

        A column that no setting names counts only when it holds true or false, or when the view asks for labels.
        """
        column = self.column(row, "label")
        if column is None:
            return None
        value = row[column]
        named = "label" in self.columns or bool(self.label_map) or self.view == "unpaired"
        if not isinstance(value, bool) and not named:
            return {"true": True, "false": False}.get(str(value).lower())
        return read_label(value, column, self.label_map)


def whole_number_text(value: Any) -> str:
    """Return a value as text, and 1.0 as 1: pandas writes so whole numbers, and booleans, beside an empty cell."""
    return re.sub(r"(?<=\d)\.0+$", "", str(value).strip()).lower()


def read_label(value: Any, column: str, label_map: Mapping[str, str | bool] | None = None) -> bool:
    """Return a label as files write it: true, false, yes, no, 1 or 0 (also as 1.0 and 0.0); or by a label map."""
    meanings = label_map or _LABELS
    word = str(value).strip()
    spellings = (str(value), word, word.lower(), whole_number_text(value))
    label = next((meanings[spelling] for spelling in spellings if spelling in meanings), None)
    if not isinstance(label, bool):
        words = ", ".join(f"{word}: {meaning}" for word, meaning in label_map.items()) if label_map else None
        missing = value is None or word.lower() in ("", "nan", "none", "<na>")
        problem = f"is {shorten(value)}, {'no label at all' if missing else 'neither true nor false'}"
        remedy = f"write true or false (known: {words or ', '.join(_LABELS)}), or give a label_map"
        raise RowError("bad label", column, problem, remedy)
    return label


def read_number(value: Any, column: str) -> float | None:
    """Return a finite number, or None when there is none."""
    if value is None or value == "" or isinstance(value, (bool, list, dict)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        raise RowError("not a finite number", column, f"is {number}", "write a finite number or remove the row")
    return number


def read_meta(value: Any, column: str) -> dict[str, Any]:
    """Return what else a row holds: an object (or the JSON text of one, as tables hold it) as it is."""
    if value is None:
        return {}
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, dict) else {column: value}


def read_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Return tool schemas as chat templates take them, from a list or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("bad tools", column, "is no valid JSON", "write a list of tool schemas") from None
    if not value:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("bad tools", column, f"is {shorten(value, 40)}", "write a list of tool schemas")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
