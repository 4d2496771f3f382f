"""Bad rows: what is wrong with one, and how a list of them is told to the user."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 20
"""How many bad rows of one kind a message lists before it only counts."""


_PLACE = re.compile(r"\[\d+\]")


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
    """A row that was refused, with its place, the reason and the raw value."""

    where: str
    error: RowError
    row: Any

    def __str__(self) -> str:
        return f"{self.where} {self.error.field}: {self.error.problem}; {self.error.remedy}"

    def report(self) -> dict[str, Any]:
        """What a line of `--report` holds."""
        error = self.error
        place = {"where": self.where, "field": error.field, "reason": error.reason}
        return place | {"problem": error.problem, "remedy": error.remedy, "row": self.row}


def count_reasons(bad: list[BadRow]) -> dict[str, int]:
    """How many rows each reason refused, most frequent first."""
    return dict(Counter(row.error.reason for row in bad).most_common())


def first_of_each_reason(bad: list[BadRow]) -> list[BadRow]:
    """The first `SHOWN` bad rows of every reason, in their order."""
    seen: Counter[str] = Counter()
    shown = []
    for row in bad:
        seen[row.error.reason] += 1
        if seen[row.error.reason] <= SHOWN:
            shown.append(row)
    return shown


def kind_of_error(error: RowError) -> tuple[str, ...]:
    """What equal errors share: all of it but the places inside the row."""
    field, problem, remedy = (_PLACE.sub("", text) for text in (error.field, error.problem, error.remedy))
    return error.reason, field, problem, remedy


def listed(bad: list[BadRow], equal: Mapping[tuple[str, ...], int]) -> list[str]:
    """One line for every kind of equal errors, with how many more rows have it."""
    lines = []
    for row in bad:
        more = equal.get(kind_of_error(row.error), 1) - 1
        lines.append(f"{row} (and {more} more {'row' if more == 1 else 'rows'} like it)" if more > 0 else str(row))
    return lines


def tell(
    name: str,
    bad: list[BadRow],
    rows: int,
    reasons: Mapping[str, int] | None = None,
    equal: Mapping[tuple[str, ...], int] | None = None,
) -> str:
    """The message about refused rows: a headline, the first of every kind, and the totals.

    `reasons` counts all bad rows where `bad` holds only some of them, and `equal` those with equal errors.
    """
    counts = Counter(reasons or count_reasons(bad))
    shown = first_of_each_reason(bad)
    told = sum((equal or {}).get(kind_of_error(row.error), 1) for row in shown)
    more = [f"  ... and {counts.total() - told} more"] if counts.total() > told else []
    totals = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    remedy = "mend them, or leave them out and counted with on_bad_row=skip"
    headline = f"{name}: {counts.total()} of {rows} rows cannot be used; {remedy}"
    return "\n".join([headline, *(f"  {line}" for line in listed(shown, equal or {})), *more, f"  total {totals}"])
