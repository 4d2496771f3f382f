"""The result of rendering: rows, and counts of the records that gave none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.rendering.fit_length import TOO_LONG, LengthLimit
from align.errors import DataError
from align.schema import Record

HISTORY = "the chat template leaves out the reasoning of turns that are context"
UNTRAINED = "turns whose reasoning the chat template leaves out are context, not trained"
UNPROMPTED = "trained behind another prompt than the chat template gives in generation"


@dataclass(frozen=True, kw_only=True)
class RenderCounts:
    """Counts of records that were rendered."""

    dropped: dict[str, int] = field(default_factory=dict)
    """rows left out, by reason"""
    tokens: int = 0
    trained_tokens: int = 0
    shortened: int = 0
    """rows kept without their oldest turns or prompt tokens"""
    stopped: int = 0
    """rows that train a stop token"""
    asked: int = 0
    """records given"""
    noted: dict[str, int] = field(default_factory=dict)
    """rows kept with something to report, by notice"""

    def require_rows(self, kept: int) -> None:
        """Raise DataError when no row was kept."""
        if not kept:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items()) or "no rows given"
            raise DataError(f"{self.asked} rows to render: 0 are left ({reasons}); {self._advise()}")

    def _advise(self) -> str:
        refused = [reason for reason in self.dropped if is_refusal(reason)]
        ways = ["raise max_length"] if TOO_LONG in self.dropped else []
        ways += [advise_on_refusals(refused)] if refused else []
        return ", ".join(ways) + (", or " if refused else " or " if ways else "") + "give other data"

    def require_stops(self, kept: int) -> None:
        """Raise DataError when rows were kept and none of them trains a stop token."""
        if kept and not self.stopped:
            raise DataError(
                f"{kept} rendered rows: none trains a stop token, so the model would never end an answer; "
                "train the last assistant turn, or use a chat template that closes it"
            )


@dataclass(frozen=True)
class RenderedRows(RenderCounts):
    """Rendered rows, and counts of the others."""

    rows: list[dict[str, Any]]

    def usable(self, *, stops: bool = False) -> RenderedRows:
        """Return itself; DataError when no row is left, or with `stops` when none trains a stop token."""
        self.require_rows(len(self.rows))
        if stops:
            self.require_stops(len(self.rows))
        return self


Renderer = Callable[[Sequence[Record], Any, LengthLimit], RenderedRows]
"""(records, tokenizer, limit) to rows; none need be left, so that parts of a dataset can be rendered apart."""


def is_refusal(reason: str) -> bool:
    """Return whether a row was dropped because of the chat template."""
    return reason.startswith(("refused by the chat template", "the chat template "))


def advise_on_refusals(reasons: Iterable[str]) -> str:
    """Return what to do about rows that a chat template refused for these reasons."""
    fold = "fold system turns into the first user turn with on_refused=fold_system, "
    other = "use a model whose chat template writes them"
    return (fold if any("ystem" in reason for reason in reasons) else "") + other


class RowCollector:
    """Rows kept and counts of rows dropped while rendering."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.notices: Counter[str] = Counter()
        self.tokens = self.trained = self.shortened = self.stops = 0

    def add(self, row: dict[str, Any], tokens: int, trained: int, shortened: bool) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.tokens += tokens
        self.trained += trained
        self.shortened += shortened

    def count_notices(self, notices: Mapping[str, bool]) -> None:
        """Count the notices that hold of the row that was kept last."""
        self.notices.update(notice for notice, holds in notices.items() if holds)

    def result(self, asked: int) -> RenderedRows:
        """Return the rows and counts of `asked` records."""
        return RenderedRows(
            self.rows,
            dropped=dict(self.dropped.most_common()),
            tokens=self.tokens,
            trained_tokens=self.trained,
            shortened=self.shortened,
            stopped=self.stops,
            asked=asked,
            noted=dict(self.notices),
        )
