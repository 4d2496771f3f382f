"""Metrics of a model, stored as sums over records so that they can be resampled, sliced and compared; and verdicts.

A judge says whose completion of each prompt is better, the model's or the first model's, or nothing where it failed;
failures are counted and reported, never scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from align.schema import Record
from align.statistics import Resamples, SumsToValue, expanded_interval, sign_test, wilson_interval

if TYPE_CHECKING:
    from align.evaluation.request import Slices

Better = Literal["higher", "lower"] | None

WIN, TIE, LOSS = 1.0, 0.5, 0.0
NO_COMPLETION = "no completion to judge"
"""reason of a missing verdict that is not the judge's failure"""

Judge = Callable[[Sequence[Record], Sequence[str | None], Sequence[str | None]], "Verdicts"]
"""from records, our completions and theirs"""


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return first sum over second, (..., 2) to (...); NaN where the second is 0."""
    below = sums[..., 1]
    return np.divide(sums[..., 0], below, out=np.full(np.shape(below), np.nan), where=below > 0)


@dataclass(frozen=True)
class Metric:
    """A metric of a model on N records."""

    name: str
    parts: np.ndarray
    """(N, K): each record's contribution to the sums; zeros where the metric does not apply"""
    rows: np.ndarray
    """(N,): the metric of each record alone; NaN where it does not apply"""
    of: SumsToValue = ratio
    better: Better = "higher"

    @property
    def count(self) -> int:
        """Number of records it applies to."""
        return int(np.isfinite(self.rows).sum())

    @property
    def value(self) -> float:
        """The metric over all records."""
        return float(self.of(self.parts.sum(axis=0)))

    def shares_records_with(self, other: Metric) -> bool:
        """Return whether both apply to some record."""
        return bool((np.isfinite(self.rows) & np.isfinite(other.rows)).any())

    def select(self, indices: np.ndarray) -> Metric:
        """Return the metric on some of the records."""
        return Metric(self.name, self.parts[indices], self.rows[indices], self.of, self.better)


@dataclass(frozen=True)
class MetricEstimate:
    """A metric with its 95% bootstrap interval, over `n` records."""

    value: float
    low: float
    high: float
    n: int
    better: Better = "higher"

    def __str__(self) -> str:
        if self.low != self.low:  # one record has no interval
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """A model against another on the same records: the paired difference with its interval, and the sign test."""

    difference: float
    low: float
    high: float
    wins: int
    """records on which the model's value is better (higher, where neither direction is better)"""
    ties: int
    losses: int
    p: float
    better: Better = "higher"

    @property
    def verdict(self) -> Literal["better", "worse", "higher", "lower", "no difference"]:
        """The sign of the difference, if its interval excludes 0."""
        if not (self.low > 0 or self.high < 0):
            return "no difference"
        up = self.low > 0
        if self.better is None:
            return "higher" if up else "lower"
        return "better" if up == (self.better == "higher") else "worse"


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


def mean_metric(name: str, values: Sequence[float] | np.ndarray, better: Better = "higher") -> Metric:
    """Return the mean over records; NaN where a record has no value."""
    rows = np.asarray(values, dtype=float)
    present = np.isfinite(rows)
    return Metric(name, np.stack([np.where(present, rows, 0.0), present], axis=1).astype(float), rows, ratio, better)


def ratio_metric(
    name: str, above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, better: Better = "higher"
) -> Metric:
    """Return a ratio of sums, such as nats over tokens; a record with NaN or 0 below is left out."""
    parts = np.nan_to_num(np.stack([np.asarray(above, dtype=float), np.asarray(below, dtype=float)], axis=1))
    return Metric(name, parts, ratio(parts), ratio, better)


def estimate_metric(metric: Metric, resamples: Resamples) -> MetricEstimate:
    """Return the metric with its bootstrap interval, or Wilson's for a share of 0 or 1.

    Resamples of all-correct records are all correct, though the next record may well be wrong.
    """
    present = metric.rows[np.isfinite(metric.rows)]
    if metric.of is ratio and len(present) > 1 and (np.all(present == 0) or np.all(present == 1)):
        _, low, high = wilson_interval(float(present.mean()), len(present))
    else:
        low, high = expanded_interval(metric.of(resamples.sums(metric.parts)), metric.count)
    return MetricEstimate(metric.value, *_snap_to_value(metric.value, low, high), metric.count, metric.better)


def _snap_to_value(value: float, low: float, high: float) -> tuple[float, float]:
    """Return the ends of an interval, an end that equals the value up to rounding as the value itself."""
    low, high = (value if math.isclose(end, value, rel_tol=1e-9, abs_tol=1e-12) else end for end in (low, high))
    return low, high


def compare_metrics(ours: Metric, theirs: Metric, resamples: Resamples) -> Comparison:
    """Return our metric minus theirs, on the records that both have a value for."""
    shared = np.isfinite(ours.rows) & np.isfinite(theirs.rows)
    our_parts, their_parts = (np.where(shared[:, None], one.parts, 0.0) for one in (ours, theirs))
    resampled = ours.of(resamples.sums(our_parts)) - theirs.of(resamples.sums(their_parts))
    difference = float(ours.of(our_parts.sum(axis=0)) - theirs.of(their_parts.sum(axis=0)))
    low, high = expanded_interval(resampled, int(shared.sum()))
    gains = (ours.rows - theirs.rows)[shared] * (-1 if ours.better == "lower" else 1)
    wins, losses = int((gains > 1e-9).sum()), int((gains < -1e-9).sum())  # equal up to rounding is a tie
    low, high = _snap_to_value(difference, low, high)
    ties = len(gains) - wins - losses
    return Comparison(difference, low, high, wins, ties, losses, sign_test(wins, losses), ours.better)


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


def classification_metrics(answers: Sequence[str], chosen: Sequence[str | None], labels: Sequence[str]) -> list[Metric]:
    """Return accuracy and macro precision, recall and F1 as scikit-learn defines them with `zero_division=0`.

    A record whose `chosen` is None is left out. Macro means are over the classes among answers or choices. By hand,
    because sums over records are what is resampled.
    """
    one_hot = dict(zip(labels, np.eye(len(labels)), strict=True))
    parts = np.zeros((len(answers), 3 * len(labels)))
    right = np.full(len(answers), np.nan)
    for row, (answer, choice) in enumerate(zip(answers, chosen, strict=True)):
        if choice is not None:
            right[row] = answer == choice
            parts[row] = np.concatenate([right[row] * one_hot[answer], one_hot[choice], one_hot[answer]])
    kinds = enumerate(("precision", "recall", "f1"))
    macros = [Metric(f"macro_{name}", parts, right, _macro(kind)) for kind, name in kinds]
    return [mean_metric("accuracy", right), *macros]


def _macro(kind: int) -> SumsToValue:
    """Return precision, recall or F1 as a function of sums (..., 3C) of right choices, choices and answers."""

    def of(sums: np.ndarray) -> np.ndarray:
        right, chosen, answers = np.split(sums, 3, axis=-1)
        above = 2 * right if kind == 2 else right
        below = (chosen, answers, chosen + answers)[kind]
        occurs = (chosen + answers) > 0
        total = occurs.sum(axis=-1)
        mean = (above / np.maximum(below, 1) * occurs).sum(axis=-1) / np.maximum(total, 1)
        return np.where(total > 0, mean, np.nan)

    return of
