"""Pairwise judging: whose completion of each prompt is better, the model's or the first model's.

A judge gives a verdict for each pair, or none where it failed; failures are counted and reported, never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from align.evaluation.metric import MetricEstimate, estimate_metric, mean_metric
from align.evaluation.overlap import Texts
from align.evaluation.request import Slices
from align.schema import Record
from align.statistics import Resamples, sign_test

WIN, TIE, LOSS = 1.0, 0.5, 0.0
NO_COMPLETION = "no completion to judge"
"""reason of a missing verdict that is not the judge's failure"""

Judge = Callable[[Sequence[Record], Texts, Texts], "Verdicts"]
"""from records, our completions and theirs"""


@dataclass
class Verdicts:
    """A judge's verdicts on N pairs."""

    rows: np.ndarray
    """(N,): 1 where ours is better, 0.5 for a tie, 0 where theirs is, NaN without a verdict"""
    failed: dict[str, int] = field(default_factory=dict)
    """pairs without a verdict by reason"""
    retries: int = 0
    swapped: int = 0
    """pairs whose verdict depended on the position, which counts as a tie"""
    asked_twice: int = 0
    """pairs judged in both positions"""


@dataclass(frozen=True)
class JudgedComparison:
    """A model against the first one by one judge; ties count half in the win rate."""

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
    """share of equal verdicts among pairs judged in both positions"""
    slices: dict[str, dict[str, MetricEstimate]] = field(default_factory=dict)
    """the win rate by column and value"""

    @property
    def has_failures(self) -> bool:
        """True when the judge failed on some pair that has completions."""
        return bool(set(self.failed) - {NO_COMPLETION})


def compare_verdicts(
    name: str, against: str, verdicts: Verdicts, seed: int = 0, groups: Slices | None = None
) -> JudgedComparison:
    """Return win rate with interval, over all records and each slice, and the sign test."""
    rows = verdicts.rows
    wins, ties, losses = (int((rows == value).sum()) for value in (WIN, TIE, LOSS))
    slices = {
        column: {value: rate for value, indices in values.items() if (rate := _win_rate(rows[indices], seed))}
        for column, values in (groups or {}).items()
    }
    consistency = 1 - verdicts.swapped / verdicts.asked_twice if verdicts.asked_twice else None
    return JudgedComparison(
        name, against, _win_rate(rows, seed), wins, ties, losses, sign_test(wins, losses), verdicts.failed,
        verdicts.retries, consistency, slices,
    )  # fmt: skip


def _win_rate(rows: np.ndarray, seed: int) -> MetricEstimate | None:
    if not np.isfinite(rows).any():
        return None
    return estimate_metric(mean_metric("win_rate", rows), Resamples(len(rows), seed))


def verdicts_from_scores(ours: np.ndarray, theirs: np.ndarray) -> Verdicts:
    """Return verdicts by scores: the completion with the higher one wins."""
    rows = (np.sign(ours - theirs) + 1) / 2  # LOSS, TIE or WIN; NaN without a score
    missing = int(np.isnan(rows).sum())
    return Verdicts(rows, {NO_COMPLETION: missing} if missing else {})
