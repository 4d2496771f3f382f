"""Statistics that several packages report: intervals, tests, agreement and rank measures over plain numbers.

What a package measures, and on what, is its own affair; here are only the formulas.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

RESAMPLES = 2000
CONFIDENCE = 0.95
_BLOCK_CELLS = 4_000_000
"""weights held at once, so that ten thousand records need no gigabyte"""

SumsToValue = Callable[[ndarray], ndarray]
"""from sums over records (..., K) to values (...)"""


class Proportion(NamedTuple):
    """A share of cases with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson_interval(mean: float, count: int, confidence: float = CONFIDENCE) -> Proportion:
    """Return Wilson's (1927) score interval of a share of `count` cases (Brown, Cai and DasGupta 2001, equation 4).

    By hand, because scipy's takes whole successes and a tie is half of one.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    whole = 1 + z**2 / count
    centre = (mean + z**2 / (2 * count)) / whole
    half = z * (mean * (1 - mean) / count + (z / (2 * count)) ** 2) ** 0.5 / whole
    return Proportion(mean, centre - half, centre + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of wins against losses under a fair coin; ties are left out (Conover 1999, 3.4)."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5))) if wins + losses else 1.0


def student_quantile(share: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, share))


def cohen_kappa(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Return Cohen's (1960) kappa of two raters from their decisions on the same cases; 0 where chance explains all."""
    count = len(pairs)
    share = sum(one == other for one, other in pairs) / count
    ones, others = (Counter(side) for side in zip(*pairs, strict=True))
    by_chance = sum(ones[kind] * others[kind] for kind in ones) / count**2
    return (share - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0


def correlation(first: ndarray, second: ndarray) -> float | None:
    """Return Pearson's correlation; None when one of the two does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def auc(scores: ndarray, labels: ndarray) -> float | None:
    """Return the area under the ROC curve, ties half, by mean ranks; None when all labels are equal."""
    from scipy.stats import rankdata

    good = labels.astype(bool)
    count = int(good.sum())
    if count in (0, len(good)):
        return None
    return float((rankdata(scores)[good].sum() - count * (count + 1) / 2) / (count * (len(good) - count)))


class Resamples:
    """Bootstrap resamples of `size` records: equal size and seed give equal resamples.

    A resample is a weighting of the records, so sums over thousands of resamples are one matrix product. Two models on
    the same records share the resamples, which makes the interval of their difference a paired one.
    """

    def __init__(self, size: int, seed: int = 0, count: int = RESAMPLES) -> None:
        self.size, self.count = size, count
        self._seed = seed
        self._weights: list[ndarray] | None = None

    def sums(self, parts: ndarray) -> ndarray:
        """Return the column sums (count, K) of each resample of parts (size, K)."""
        drawn = self._weights or self._draw_weights()
        if self._weights is None and self.size * self.count <= 10 * _BLOCK_CELLS:
            drawn = self._weights = list(drawn)
        return np.concatenate([weights @ parts for weights in drawn])

    def _draw_weights(self) -> Iterator[ndarray]:
        """Yield how often each record is in each resample, (rows of a block, size)."""
        rng = np.random.default_rng([self._seed, self.size])
        step = max(1, _BLOCK_CELLS // self.size)
        for start in range(0, self.count, step):
            rows = min(step, self.count - start)
            indices = rng.integers(self.size, size=(rows, self.size)) + self.size * np.arange(rows)[:, None]
            counts = np.bincount(indices.ravel(), minlength=rows * self.size)
            yield counts.reshape(rows, self.size).astype(float)


def expanded_interval(values: ndarray, size: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of bootstrap values, widened for `size` records (Hesterberg 2015, 5.3).

    Plain percentiles are too narrow, as a normal interval with s of n instead of n - 1 and z instead of t would be.
    """
    values = values[np.isfinite(values)]
    if size < 2 or not len(values):
        return math.nan, math.nan
    tail = 1 - NormalDist().cdf(math.sqrt(size / (size - 1)) * student_quantile((1 + confidence) / 2, size - 1))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
