"""Aligned text for terminals; narrow ones lose the least important columns."""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from datetime import UTC, datetime

_UNLIMITED_COLUMNS = 100_000
_MIN_VALUE_COLUMNS = 30
_UNITS_S = (("d", 86400), ("h", 3600), ("min", 60))


def terminal_width() -> int:
    """Return the columns of the terminal; practically unlimited in a pipe, unless $COLUMNS is set."""
    return shutil.get_terminal_size((_UNLIMITED_COLUMNS, 24)).columns


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Return rows of cells as aligned lines."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(_pad(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def format_facts(rows: list[tuple[str, str]], width: int) -> str:
    """Return (name, value) rows as aligned lines; long values are wrapped."""
    left = max(_width(name) for name, _ in rows) + 2
    columns = max(width - left, _MIN_VALUE_COLUMNS)
    lines = []
    for name, value in rows:
        wrapped = textwrap.wrap(value, columns, break_long_words=False, break_on_hyphens=False)
        lines += [_pad("" if number else name, left) + line for number, line in enumerate(wrapped)]
    return "\n".join(lines)


def format_fitting(rows: list[dict[str, str]], least_important: tuple[str, ...], width: int) -> str:
    """Return rows under their headings, without columns of `least_important` (in that order) until they fit `width`.

    Columns that are empty everywhere are left out in any case.
    """
    columns = [key for key in rows[0] if any(row[key] for row in rows)]
    for omitted in ["", *least_important]:
        columns = [key for key in columns if key != omitted]
        text = format_table([tuple(columns), *(tuple(row[key] or "-" for key in columns) for row in rows)])
        if max(map(_width, text.split("\n"))) <= width:
            break
    return text


def format_size(count: int) -> str:
    """Return a number of bytes with its unit, such as `1.5 MB`."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def format_age(created: str, now: datetime | None = None) -> str:
    """Return the age of an ISO time, such as `3 d`; `now` below a minute and for times in the future."""
    try:
        then = datetime.fromisoformat(created)
    except ValueError:
        return created
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    return next((f"{int(seconds // length)} {unit}" for unit, length in _UNITS_S if seconds >= length), "now")


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
