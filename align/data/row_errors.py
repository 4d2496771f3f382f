"""Raw rows, what can be wrong with one, and how a list of bad rows is shown to the user."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SHOWN = 20
"""Different errors of one reason that a message lists; the others are counted."""
_INDEX = re.compile(r"\[\d+\]")


class RawRow(NamedTuple):
    """A row as its file holds it; `value` is a RowError when the file holds no readable row there."""

    source: str
    line: int
    value: Any


class RowError(Exception):
    """One row cannot be used. `reason` is the short name it is counted under."""

    def __init__(self, reason: str, field: str, problem: str, remedy: str) -> None:
        super().__init__(reason, field, problem, remedy)
        self.reason, self.field, self.problem, self.remedy = reason, field, problem, remedy


class RowSkipped(Exception):
    """A sound row is left out by choice, such as a tie; it is counted and never an error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BadRow:
    """A refused row: its file and line, the error and the raw value."""

    where: str
    error: RowError
    row: Any

    def __str__(self) -> str:
        return f"{self.where} {self.error.field}: {self.error.problem}; {self.error.remedy}"

    @property
    def kind(self) -> tuple[str, ...]:
        """Return what equal errors share: all of it but the places inside the row, such as `[3]`."""
        error = self.error
        return error.reason, *(_INDEX.sub("", text) for text in (error.field, error.problem, error.remedy))

    def report(self) -> dict[str, Any]:
        """Return one line of `--report`."""
        error = {name: getattr(self.error, name) for name in ("field", "reason", "problem", "remedy")}
        return {"where": self.where, **error, "row": self.row}


@dataclass
class BadRows:
    """The refused rows of a dataset: all counted by reason, and the first row of every different error kept."""

    shown: list[BadRow] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    _alike: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """rows with the error of a kept row, by that error"""

    def add(self, row: BadRow) -> None:
        """Count a row, and keep it unless its error, or many others of its reason, were kept already."""
        self.reasons[row.error.reason] += 1
        self._keep(row, 1)

    def update(self, other: BadRows) -> None:
        """Add the rows of another dataset."""
        self.reasons.update(other.reasons)
        for row in other.shown:
            self._keep(row, other._alike[row.kind])

    def _keep(self, row: BadRow, count: int) -> None:
        kind = row.kind
        if kind in self._alike:
            self._alike[kind] += count
        elif sum(reason == row.error.reason for reason, *_ in self._alike) < SHOWN:
            self._alike[kind] = count
            self.shown.append(row)

    def lines(self) -> list[str]:
        """Return one line for each different error, with how many more rows have it, then the count of the others."""
        lines = []
        for row in self.shown:
            more = self._alike[row.kind] - 1
            lines.append(f"{row} (and {more} more {'row' if more == 1 else 'rows'} like it)" if more else str(row))
        return lines

    @property
    def not_shown(self) -> int:
        """The number of bad rows that no line stands for."""
        return self.reasons.total() - self._alike.total()

    def message(self, name: str, rows: int) -> str:
        """Return the error text: a headline, a line for each different error, and the totals by reason."""
        remedy = "fix them, or leave them out and counted with on_bad_row=skip"
        lines = [f"{name}: {self.reasons.total()} of {rows} rows cannot be used; {remedy}"]
        lines += [f"  {line}" for line in self.lines()]
        if self.not_shown:
            lines.append(f"  ... and {self.not_shown} more")
        totals = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
        return "\n".join([*lines, f"  total {totals}"])
