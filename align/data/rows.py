"""How the rows of one dataset are laid out: which column plays which part."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.problems import RowError
from align.data.turns import OPENAI_TAGS, Tags, checked_text, read_answer, read_context
from align.errors import nearest, shorten
from align.schema import Messages, View

Row = dict[str, Any]
Synonyms = Mapping[str, tuple[str, ...]]

COMMON: Synonyms = {
    "tools": ("tools",),
    "id": ("id",),
    "weight": ("weight",),
    "margin": ("margin",),
    "score": ("score",),
}
"""Parts that every format knows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns, tags and policies a reader follows.

    `columns` maps a part to the column that plays it and wins over `synonyms`, the spellings a format knows by itself.
    """

    synonyms: Synonyms
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    tags: Tags = OPENAI_TAGS
    view: View | None = None
    label_map: Mapping[str, str] = field(default_factory=dict)
    ties: str = "drop"

    def column(self, row: Row, part: str) -> str | None:
        """The name of the column that plays this part in this row, if any."""
        named = self.columns.get(part)
        if isinstance(named, str):
            return named if named in row else None
        return next((name for name in self.synonyms.get(part, ()) if name in row), None)

    def get(self, row: Row, part: str) -> Any:
        """The value of an optional part; None when absent, null or (as tables write it) empty."""
        column = self.column(row, part)
        value = row[column] if column is not None else None
        return None if value == "" else value

    def need(self, row: Row, part: str) -> tuple[str, Any]:
        """Name and value of a part every row must have."""
        column = self.column(row, part)
        if column is None:
            named = self.columns.get(part)
            wanted = named if isinstance(named, str) else (self.synonyms.get(part) or (part,))[0]
            hint = nearest(wanted, row).strip()
            remedy = f"rename it or say `columns: {{{part}: ...}}`. {hint}".rstrip()
            raise RowError("missing column", wanted, f"no such column (columns: {', '.join(row) or 'none'})", remedy)
        return column, row[column]

    def text(self, row: Row, part: str, empty: str | None) -> str:
        """A text every row must have; blank is refused under the reason `empty`, unless that is None."""
        column, value = self.need(row, part)
        return checked_text(value, column, empty)

    def context(self, row: Row, part: str) -> Messages:
        """The turns of a prompt every row must have."""
        column, value = self.need(row, part)
        return read_context(value, column, self.tags)

    def answer(self, row: Row, part: str) -> Messages:
        """The turns of an answer every row must have."""
        column, value = self.need(row, part)
        return read_answer(value, column, self.tags)

    def optional_text(self, row: Row, part: str) -> str | None:
        """A text that may be absent, null or blank."""
        value = self.get(row, part)
        if value is None:
            return None
        text = checked_text(value, self.column(row, part) or part, None)
        return text if text.strip() else None

    def label(self, row: Row) -> bool | None:
        """The good-or-bad label, if any; a column nobody named counts only when it holds true or false."""
        column = self.column(row, "label")
        if column is None:
            return None
        value = row[column]
        if not isinstance(value, bool) and "label" not in self.columns:
            value = {"true": True, "false": False}.get(str(value).lower(), value)
            return value if isinstance(value, bool) else None
        return read_label(value, column)

    def used(self) -> set[str]:
        """Every column name this layout gives a meaning."""
        names = {name for part, known in self.synonyms.items() if part not in self.columns for name in known}
        for column in self.columns.values():
            names.update([column] if isinstance(column, str) else column)
        return names


def read_label(value: Any, column: str) -> bool:
    """A label as files write it: true, false, 1, 0 or those words."""
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).lower())
    if found is None:
        raise RowError("bad label", column, f"is {shorten(value)}, neither true nor false", "write true or false")
    return found


def read_number(value: Any, column: str) -> float | None:
    """A finite number, or None when there is none."""
    if value is None or value == "" or isinstance(value, (bool, list, dict)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        raise RowError("not a finite number", column, f"is {number}", "write a finite number or remove the row")
    return number


def read_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Tool schemas as chat templates take them, from a list or the JSON text of one."""
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
