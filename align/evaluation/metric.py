"""Measures: one number about a model, kept as sums over records so that it can be resampled, sliced and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from align.statistics import Resamples, SumsToValue, expanded_interval, sign_test, wilson_interval

Better = Literal["higher", "lower"] | None


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum over second, (..., 2) to (...); not a number where the second is 0."""
    below = sums[..., 1]
    return np.divide(sums[..., 0], below, out=np.full(np.shape(below), np.nan), where=below > 0)


@dataclass(frozen=True)
class Metric:
    """A number about a model on N records."""

    name: str
    parts: np.ndarray
    """(N, K): what each record adds to the sums; zeros for a record it does not apply to"""
    rows: np.ndarray
    """(N,): the number of each record alone; not a number where it does not apply"""
    of: SumsToValue = ratio
    better: Better = "higher"

    @property
    def count(self) -> int:
        """How many records it applies to."""
        return int(np.isfinite(self.rows).sum())

    @property
    def value(self) -> float:
        """The number over all records."""
        return float(self.of(self.parts.sum(axis=0)))

    def meets(self, other: Metric) -> bool:
        """Whether both apply to some record."""
        return bool((np.isfinite(self.rows) & np.isfinite(other.rows)).any())

    def take(self, places: np.ndarray) -> Metric:
        """The same measure on some of the records."""
        return Metric(self.name, self.parts[places], self.rows[places], self.of, self.better)


@dataclass(frozen=True)
class MetricEstimate:
    """A measure with its 95% bootstrap interval, over `n` records."""

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
    """records on which the model's own number is the better one (the higher one, where neither is better)"""
    ties: int
    losses: int
    p: float
    better: Better = "higher"

    @property
    def verdict(self) -> Literal["better", "worse", "higher", "lower", "no difference"]:
        """What the interval of the difference says."""
        if not (self.low > 0 or self.high < 0):
            return "no difference"
        up = self.low > 0
        if self.better is None:
            return "higher" if up else "lower"
        return "better" if up == (self.better == "higher") else "worse"

    def as_dict(self) -> dict[str, Any]:
        """JSON values, with the verdict."""
        return {**asdict(self), "verdict": self.verdict}


def mean_metric(name: str, values: Sequence[float] | np.ndarray, better: Better = "higher") -> Metric:
    """The mean of one number a record; NaN where a record has none."""
    rows = np.asarray(values, dtype=float)
    known = np.isfinite(rows)
    return Metric(name, np.stack([np.where(known, rows, 0.0), known], axis=1).astype(float), rows, ratio, better)


def ratio_metric(
    name: str, above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, better: Better = "higher"
) -> Metric:
    """A sum over another, such as nats over tokens; NaN or 0 below leaves a record out."""
    parts = np.nan_to_num(np.stack([np.asarray(above, dtype=float), np.asarray(below, dtype=float)], axis=1))
    return Metric(name, parts, ratio(parts), ratio, better)


def estimate(measure: Metric, resamples: Resamples) -> MetricEstimate:
    """The measure with its bootstrap interval; a share of which every record is alike with Wilson's instead.

    Resampling what is all right can only give all right, though the next record may well be wrong.
    """
    known = measure.rows[np.isfinite(measure.rows)]
    if measure.of is ratio and len(known) > 1 and (np.all(known == 0) or np.all(known == 1)):
        _, low, high = wilson_interval(float(known.mean()), len(known))
    else:
        low, high = expanded_interval(measure.of(resamples.sums(measure.parts)), measure.count)
    return MetricEstimate(measure.value, *_met(measure.value, low, high), measure.count, measure.better)


def _met(value: float, low: float, high: float) -> tuple[float, float]:
    """The ends of an interval; one that differs from the value in the last bits of two sums is the value."""
    low, high = (value if math.isclose(end, value, rel_tol=1e-9, abs_tol=1e-12) else end for end in (low, high))
    return low, high


def compare(ours: Metric, theirs: Metric, resamples: Resamples) -> Comparison:
    """Our measure less theirs on the records that both have a number for."""
    both = np.isfinite(ours.rows) & np.isfinite(theirs.rows)
    mine, other = (np.where(both[:, None], each.parts, 0.0) for each in (ours, theirs))
    drawn = ours.of(resamples.sums(mine)) - theirs.of(resamples.sums(other))
    difference = float(ours.of(mine.sum(axis=0)) - theirs.of(other.sum(axis=0)))
    low, high = expanded_interval(drawn, int(both.sum()))
    gains = (ours.rows - theirs.rows)[both] * (-1 if ours.better == "lower" else 1)
    # What differs in the last bits of two sums is equal.
    wins, losses = int((gains > 1e-9).sum()), int((gains < -1e-9).sum())
    return Comparison(
        difference, *_met(difference, low, high), wins, len(gains) - wins - losses, losses, sign_test(wins, losses),
        ours.better,
    )  # fmt: skip
