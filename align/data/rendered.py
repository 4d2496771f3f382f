"""What rendering gives: rows, what became of the records that gave none, and what a template must be able to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.fitting import TOO_LONG, Fit
from align.data.templates import ChatFormat, chat_format
from align.errors import DataError
from align.schema import Record

HISTORY = "the chat template leaves out the reasoning of turns that are context"
UNTRAINED = "turns whose reasoning the chat template leaves out are context, not trained"
UNPROMPTED = "trained behind another prompt than the chat template gives in generation"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of records that were rendered."""

    dropped: dict[str, int] = field(default_factory=dict)
    """rows left out, by reason"""
    tokens: int = 0
    trained_tokens: int = 0
    shortened: int = 0
    """rows kept without their oldest turns or prompt tokens"""
    stopped: int = 0
    """rows that train a stop token"""
    asked: int = 0
    """records that were to be rendered"""
    noted: dict[str, int] = field(default_factory=dict)
    """rows kept of which something is to be told, by what"""

    def require_rows(self, kept: int) -> None:
        """Raise DataError when no row was kept."""
        if not kept:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items()) or "no rows given"
            raise DataError(f"{self.asked} rows to render: 0 are left ({reasons}); {self._way_out()}")

    def _way_out(self) -> str:
        refused = [reason for reason in self.dropped if is_refusal(reason)]
        ways = ["raise max_length"] if TOO_LONG in self.dropped else []
        ways += [writable(refused)] if refused else []
        return ", ".join(ways) + (", or " if refused else " or " if ways else "") + "give other data"

    def require_stops(self, kept: int) -> None:
        """Raise DataError when rows were kept and none of them trains a stop token."""
        if kept and not self.stopped:
            raise DataError(
                f"{kept} rendered rows: none trains a stop token, so the model would never end an answer; "
                "train the last assistant turn, or use a chat template that closes it"
            )


@dataclass(frozen=True)
class Rendered(Counts):
    """Rendered rows and what became of the others."""

    rows: list[dict[str, Any]]

    def usable(self, *, stops: bool = False) -> Rendered:
        """Itself; DataError when no row is left, or with `stops` when none trains a stop token."""
        self.require_rows(len(self.rows))
        if stops:
            self.require_stops(len(self.rows))
        return self


def is_refusal(reason: str) -> bool:
    """Whether a row was dropped because of the chat template."""
    return reason.startswith(("refused by the chat template", "the chat template "))


def writable(reasons: Iterable[str]) -> str:
    """What to do about rows that a chat template refused, with these reasons."""
    fold = "fold system turns into the first user turn with on_refused=fold_system, "
    return (
        fold if any("ystem" in reason for reason in reasons) else ""
    ) + "use a model whose chat template writes them"


Renderer = Callable[[Sequence[Record], Any, Fit], Rendered]
"""Records, tokenizer and length to rows; nothing is required of the whole, so that parts can be rendered apart."""


class Tally:
    """Rows kept and rows dropped while rendering."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.tokens = self.trained = self.shortened = self.stops = 0

    def add(self, row: dict[str, Any], tokens: int, trained: int, shortened: bool) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.tokens += tokens
        self.trained += trained
        self.shortened += shortened

    def note(self, facts: Mapping[str, bool]) -> None:
        """Count what holds of the row that was kept last."""
        for fact, holds in facts.items():
            if holds:
                self.noted[fact] += 1

    def result(self, asked: int) -> Rendered:
        """The finished rows."""
        return Rendered(
            self.rows,
            dropped=dict(self.dropped.most_common()),
            tokens=self.tokens,
            trained_tokens=self.trained,
            shortened=self.shortened,
            stopped=self.stops,
            asked=asked,
            noted=dict(self.noted),
        )


def template_of(tokenizer: Any) -> ChatFormat:
    """What is known of a tokenizer's chat template; DataError when it has none."""
    if tokenizer.chat_template is None:
        raise DataError("tokenizer: it has no chat template, which says how a conversation is written; set one")
    return chat_format(tokenizer)


def require_stop(style: ChatFormat) -> None:
    """Raise DataError when no control token follows an assistant turn."""
    if style.end_of_turn is None:
        raise DataError(
            "chat template: no control token follows an assistant turn, so a model could not learn to stop; "
            "use a template that ends assistant turns with the EOS token"
        )
