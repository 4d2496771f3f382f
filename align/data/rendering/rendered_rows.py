"""The result of rendering: rows, and counts of the records that gave none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from align.data.rendering.chat_template import RowDropped
from align.errors import DataError

TOO_LONG = "longer than max_length"
HISTORY = "the chat template leaves out the reasoning of turns that are context"
UNTRAINED = "turns whose reasoning the chat template leaves out are context, not trained"
UNPROMPTED = "trained behind another prompt than the chat template gives in generation"


@dataclass(kw_only=True)
class RenderCounts:
    """Counts of records that were rendered."""

    dropped: dict[str, int] = field(default_factory=Counter)
    """rows left out, by reason"""
    tokens: int = 0
    trained_tokens: int = 0
    shortened: int = 0
    """rows kept without their oldest turns or prompt tokens"""
    stopped: int = 0
    """rows that train a stop token"""
    asked: int = 0
    """records given"""
    noted: dict[str, int] = field(default_factory=Counter)
    """rows kept with something to report, by notice"""

    def require_rows(self, kept: int, *, stops: bool = False) -> None:
        """Raise DataError when no row was kept or, with `stops`, none of them trains a stop token."""
        if kept and stops and not self.stopped:
            raise DataError(
                f"{kept} rendered rows: none trains a stop token, so the model would never end an answer; "
                "train the last assistant turn, or use a chat template that closes it"
            )
        if kept:
            return
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items()) or "no rows given"
        refused = [reason for reason in self.dropped if is_refusal(reason)]
        ways = ["raise max_length"] if TOO_LONG in self.dropped else []
        ways += [advise_on_refusals(refused)] if refused else []
        advice = ", ".join(ways) + (", or " if refused else " or " if ways else "") + "give other data"
        raise DataError(f"{self.asked} rows to render: 0 are left ({reasons}); {advice}")


@dataclass(kw_only=True)
class RenderedRows(RenderCounts):
    """Rendered rows, and counts of the others."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def counting_drops(self) -> Iterator[None]:
        """Count a row that is dropped inside, under its reason."""
        try:
            yield
        except RowDropped as error:
            self.dropped[str(error)] += 1

    def add(
        self, row: dict[str, Any], tokens: int, trained: int, shortened: bool = False, notices: Iterable[str] = ()
    ) -> None:
        """Keep a row, and count what is to be said of it."""
        self.rows.append(row)
        self.tokens += tokens
        self.trained_tokens += trained
        self.shortened += shortened
        for notice in notices:
            self.noted[notice] += 1

    def ordered(self) -> RenderedRows:
        """Return itself, the most frequent reasons first."""
        self.dropped = dict(Counter(self.dropped).most_common())
        return self


def is_refusal(reason: str) -> bool:
    """Return whether a row was dropped because of the chat template."""
    return reason.startswith(("refused by the chat template", "the chat template "))


def advise_on_refusals(reasons: Iterable[str]) -> str:
    """Return what to do about rows that a chat template refused for these reasons."""
    fold = "fold system turns into the first user turn with on_refused=fold_system, "
    other = "use a model whose chat template writes them"
    return (fold if any("ystem" in reason for reason in reasons) else "") + other
