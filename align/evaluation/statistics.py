"""How sure a number is: bootstrap intervals and the sign test, over sums of records.

Every measure of a model is made from sums over records (`align.evaluation.measures`), so a resample of the records is a
weighting of them, and thousands of resamples are one matrix product. Two models on the same records share the
resamples, which makes the interval of their difference a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
_BLOCK = 4_000_000
"""cells of a block of weights, so that ten thousand records need no gigabyte"""

Of = Callable[[np.ndarray], np.ndarray]
"""from sums (..., K) to values (...)"""


class Resamples:
    """Resamples with replacement of `size` records: equal size and seed give equal resamples."""

    def __init__(self, size: int, seed: int = 0, count: int = RESAMPLES) -> None:
        self.size, self.count = size, count
        self._seed = seed
        self._kept: list[np.ndarray] | None = None

    def sums(self, parts: np.ndarray) -> np.ndarray:
        """The column sums (count, K) of each resample of parts (size, K)."""
        return np.concatenate([weights @ parts for weights in self._blocks()])

    def _blocks(self) -> list[np.ndarray] | Iterator[np.ndarray]:
        if self.size * self.count > 10 * _BLOCK:
            return self._draw()
        if self._kept is None:
            self._kept = list(self._draw())
        return self._kept

    def _draw(self) -> Iterator[np.ndarray]:
        """How often each record is in each resample, (rows of a block, size)."""
        rng = np.random.default_rng([self._seed, self.size])
        step = max(1, _BLOCK // self.size)
        for start in range(0, self.count, step):
            rows = min(step, self.count - start)
            places = rng.integers(self.size, size=(rows, self.size)) + self.size * np.arange(rows)[:, None]
            counts = np.bincount(places.ravel(), minlength=rows * self.size)
            yield counts.reshape(rows, self.size).astype(float)


def expanded_interval(values: np.ndarray, size: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of bootstrap values, widened for `size` records as Hesterberg (2015, 5.3) advises.

    Plain percentiles are too narrow, as a normal interval with s of n instead of n - 1 and z instead of t would be.
    """
    values = values[np.isfinite(values)]
    if size < 2 or not len(values):
        return math.nan, math.nan
    tail = 1 - NormalDist().cdf(math.sqrt(size / (size - 1)) * student_quantile((1 + confidence) / 2, size - 1))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def student_quantile(share: float, degrees: int) -> float:
    """Student's t quantile by its expansion around the normal one (Abramowitz and Stegun 26.7.5); 1 % off at 3."""
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of wins against losses under a fair coin; ties are left out (Conover 1999, 3.4)."""
    total, fewer = wins + losses, min(wins, losses)
    if total == 0:
        return 1.0
    log_total = math.lgamma(total + 1)
    logs = [log_total - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in logs))
