"""Statistics of scores: pure functions over numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from align.errors import DataError


@dataclass(frozen=True)
class Interval:
    """A mean and the interval it lies in with some confidence."""

    mean: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values with its normal interval: mean ± z * s / sqrt(n), s with n - 1.

    By the central limit theorem; see Wasserman 2004, All of Statistics, theorem 6.16.
    """
    if len(values) < 2:
        raise DataError(f"interval of a mean: {len(values)} values given; it takes two or more")
    array = np.asarray(values, dtype=float)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    mean, margin = float(array.mean()), z * float(array.std(ddof=1)) / len(array) ** 0.5
    return Interval(mean, mean - margin, mean + margin)
