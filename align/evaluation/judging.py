"""Pairwise judging: whose completion of each prompt is better, the model's or the first model's.

A judge gives a verdict for each pair, or none where it failed; a failure is counted and told, never a score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from align.evaluation.metric import MetricEstimate, estimate, mean_metric
from align.evaluation.overlap import Texts
from align.evaluation.slices import Slices
from align.schema import Record
from align.statistics import Resamples, sign_test

WIN, TIE, LOSS = 1.0, 0.5, 0.0
NOTHING = "no completion to judge"
"""the reason for no verdict that is not the judge's"""

Judge = Callable[[Sequence[Record], Texts, Texts], "Verdicts"]
"""from records, our completions and theirs"""


@dataclass
class Verdicts:
    """What a judge said of N pairs."""

    rows: np.ndarray
    """(N,): 1 where ours is better, 0.5 for a tie, 0 where theirs is, not a number without a verdict"""
    failed: dict[str, int] = field(default_factory=dict)
    """pairs without a verdict by reason"""
    retries: int = 0
    swapped: int = 0
    """pairs whose verdict followed the position, which makes a tie"""
    asked_twice: int = 0
    """pairs judged in both positions"""


@dataclass(frozen=True)
class JudgedComparison:
    """A model against the first one by some judge; ties count half in the win rate."""

    judge: str
    against: str
    win_rate: MetricEstimate | None
    wins: int
    ties: int
    losses: int
    p: float
    """two-sided sign test of wins against losses"""
    failed: dict[str, int]
    retries: int
    consistency: float | None
    """share of pairs on which a judge asked in both positions said the same"""
    slices: dict[str, dict[str, MetricEstimate]] = field(default_factory=dict)
    """the win rate by column and value"""

    @property
    def silent(self) -> bool:
        """Whether the judge failed on every pair it was asked about; equal completions tie unasked."""
        return self.win_rate is None or (self.consistency is None and self.lacking)

    @property
    def lacking(self) -> bool:
        """Whether the judge failed on some pair; that nothing was written is no failure of the judge."""
        return bool(set(self.failed) - {NOTHING})

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def judged(name: str, against: str, verdicts: Verdicts, seed: int = 0, parts: Slices | None = None) -> JudgedComparison:
    """The win rate with its interval, over all records and over each part of them, and the sign test."""
    rows = verdicts.rows
    known = rows[np.isfinite(rows)]
    wins, ties, losses = (int((known == value).sum()) for value in (WIN, TIE, LOSS))
    slices = {
        column: {value: rate for value, places in values.items() if (rate := _win_rate(rows[places], seed))}
        for column, values in (parts or {}).items()
    }
    consistency = 1 - verdicts.swapped / verdicts.asked_twice if verdicts.asked_twice else None
    return JudgedComparison(
        name, against, _win_rate(rows, seed), wins, ties, losses, sign_test(wins, losses), verdicts.failed,
        verdicts.retries, consistency, slices,
    )  # fmt: skip


def _win_rate(rows: np.ndarray, seed: int) -> MetricEstimate | None:
    """The mean verdict; None where there is none."""
    return estimate(mean_metric("win_rate", rows), Resamples(len(rows), seed)) if np.isfinite(rows).any() else None


def verdicts_from_scores(ours: np.ndarray, theirs: np.ndarray) -> Verdicts:
    """Verdicts from one score for each completion: the higher one wins."""
    gains = ours - theirs
    rows = np.where(np.isnan(gains), np.nan, np.where(gains > 0, WIN, np.where(gains < 0, LOSS, TIE)))
    missing = int(np.isnan(gains).sum())
    return Verdicts(rows, {NOTHING: missing} if missing else {})
