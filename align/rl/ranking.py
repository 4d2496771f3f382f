"""How well scores rank answers: accuracy, calibration, and how much of it is length. Pure functions over numbers."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy import ndarray

BINS = 10


@dataclass(frozen=True)
class Pairs:
    """Scores of chosen and rejected answers and the lengths of these answers in tokens, each (N,)."""

    chosen: ndarray
    rejected: ndarray
    chosen_lengths: ndarray
    rejected_lengths: ndarray

    @property
    def margins(self) -> ndarray:
        """By how much each chosen answer is ahead, (N,)."""
        return self.chosen - self.rejected


class Share(NamedTuple):
    """A share of cases and the interval it lies in with 95% confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Reliability(NamedTuple):
    """Bins of predicted probability that hold cases: mean prediction, observed frequency and cases of each."""

    predicted: ndarray
    observed: ndarray
    counts: ndarray


def describe_pairs(pairs: Pairs) -> dict[str, float]:
    """The numbers of a held-out report; what cannot be computed (no chosen answer is shorter, say) is left out."""
    margins = pairs.margins
    share = accuracy(margins)
    gaps = (pairs.chosen_lengths - pairs.rejected_lengths).astype(float)
    numbers: dict[str, float | None] = {
        "held_out_pairs": float(len(margins)),
        "held_out_loss": float(np.logaddexp(0, -margins).mean()),
        "held_out_accuracy": share.mean,
        "held_out_accuracy_low": share.low,
        "held_out_accuracy_high": share.high,
        "score_chosen": float(pairs.chosen.mean()),
        "score_rejected": float(pairs.rejected.mean()),
        "ece": calibration_error(reliability(margins)),
        "brier": brier(margins),
        "length_correlation": correlation(
            np.concatenate([pairs.chosen, pairs.rejected]),
            np.concatenate([pairs.chosen_lengths, pairs.rejected_lengths]),
        ),
        "accuracy_chosen_shorter": _accuracy_where(margins, gaps < 0),
        "accuracy_chosen_longer": _accuracy_where(margins, gaps > 0),
        "accuracy_of_longer": accuracy(gaps).mean,
    }
    return {key: value for key, value in numbers.items() if value is not None}


def _accuracy_where(margins: ndarray, these: ndarray) -> float | None:
    return accuracy(margins[these]).mean if these.any() else None


def accuracy(margins: ndarray) -> Share:
    """The share of pairs in which the chosen answer is ahead; a pair of equal scores is half right.

    The interval is Wilson's (1927), which stays within [0, 1] and holds for few pairs.
    """
    return wilson(float(((margins > 0) + 0.5 * (margins == 0)).mean()), len(margins))


def wilson(mean: float, count: int, confidence: float = 0.95) -> Share:
    """The score interval of a share of `count` cases (Brown, Cai and DasGupta 2001, equation 4)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    whole = 1 + z**2 / count
    centre = (mean + z**2 / (2 * count)) / whole
    half = z * (mean * (1 - mean) / count + (z / (2 * count)) ** 2) ** 0.5 / whole
    return Share(mean, centre - half, centre + half)


def reliability(margins: ndarray, bins: int = BINS) -> Reliability:
    """How often the first of two answers was the chosen one, by sigmoid(first score - second score).

    Each pair is seen in both orders: in the order given alone, the first answer would always be the chosen one.
    """
    predicted = _sigmoid(np.concatenate([margins, -margins]))
    was_chosen = np.arange(2 * len(margins)) < len(margins)
    places = np.minimum((predicted * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    held = counts > 0
    means = [np.bincount(places, weights, bins)[held] / counts[held] for weights in (predicted, was_chosen)]
    return Reliability(means[0], means[1], counts[held])


def calibration_error(curve: Reliability) -> float:
    """Expected calibration error: the mean distance of prediction and frequency (Guo et al. 2017, equation 3)."""
    return float(np.average(np.abs(curve.predicted - curve.observed), weights=curve.counts))


def brier(margins: ndarray) -> float:
    """Mean squared error of sigmoid(margin) as the probability of what was chosen (Brier 1950); a coin has 0.25."""
    return float(((1 - _sigmoid(margins)) ** 2).mean())


def correlation(first: ndarray, second: ndarray) -> float | None:
    """Pearson's correlation; None when one of the two does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def auc(scores: ndarray, labels: ndarray) -> float | None:
    """The chance that a good answer scores above a bad one, ties half; None when all answers have one label.

    By mean ranks: the statistic of Mann and Whitney (1947) over the number of pairs.
    """
    good = labels.astype(bool)
    count = int(good.sum())
    if count in (0, len(good)):
        return None
    _, places, times = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[places]
    return float((ranks[good].sum() - count * (count + 1) / 2) / (count * (len(good) - count)))


def _sigmoid(values: ndarray) -> ndarray:
    return np.exp(-np.logaddexp(0, -values))
