"""Columns for terminals: aligned, and on a narrow one without the columns that matter least."""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime

_ANY_WIDTH = 100_000
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def terminal_width() -> int:
    """Characters in a line of the terminal; in a pipe as many as it takes, unless $COLUMNS says otherwise."""
    return shutil.get_terminal_size((_ANY_WIDTH, 24)).columns


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as aligned lines."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(_pad(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def facts(rows: list[tuple[str, str]], width: int) -> str:
    """Names and what is said of them, long sayings continued below themselves."""
    left = max(_width(key) for key, _ in rows) + 2
    room = max(width - left, 30)
    wrapped = [(key, textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False)) for key, value in rows]
    lines = [(key if first else "", line) for key, found in wrapped for first, line in _with_first(found)]
    return "\n".join(f"{_pad(key, left)}{line}" for key, line in lines)


def _with_first(lines: list[str]) -> Iterator[tuple[bool, str]]:
    return ((index == 0, line) for index, line in enumerate(lines))


def fitted(rows: list[dict[str, str]], least_first: tuple[str, ...], width: int) -> str:
    """Rows under their headings, within `width` if leaving out columns of `least_first`, in that order, can do it.

    Columns that are empty everywhere are left out in any case.
    """
    kept = [key for key in rows[0] if any(row[key] for row in rows)]
    for key in ["", *least_first]:
        kept = [each for each in kept if each != key]
        cells = [tuple(kept), *(tuple(row[each] or "-" for each in kept) for row in rows)]
        drawn = table(cells)
        if max(map(_width, drawn.split("\n"))) <= width:
            break
    return drawn


def size(count: int) -> str:
    """Bytes as people say them."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def age(created: str, now: datetime | None = None) -> str:
    """How long ago an ISO time was: `3 d`; less than a minute, or yet to come by a clock that went back, is `now`."""
    try:
        then = datetime.fromisoformat(created)
    except ValueError:
        return created
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "now"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
