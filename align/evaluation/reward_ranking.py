"""The ranking quality of scores: accuracy, calibration, and the influence of length; pure functions over numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from align.statistics import Proportion, correlation, wilson_interval

BINS = 10


@dataclass(frozen=True)
class ScoredPairs:
    """Scores of chosen and rejected answers and the lengths of these answers in tokens, each (N,)."""

    chosen: ndarray
    rejected: ndarray
    chosen_lengths: ndarray
    rejected_lengths: ndarray

    @property
    def margins(self) -> ndarray:
        """Score of the chosen answer less that of the rejected one, (N,)."""
        return self.chosen - self.rejected


class Reliability(NamedTuple):
    """The bins of predicted probability that are not empty: mean prediction, observed frequency and cases of each."""

    predicted: ndarray
    observed: ndarray
    counts: ndarray


def describe_pairs(pairs: ScoredPairs) -> dict[str, float]:
    """Return the numbers of a held-out report, without those that apply to no pair."""
    margins = pairs.margins
    share = accuracy(margins)
    gaps = (pairs.chosen_lengths - pairs.rejected_lengths).astype(float)
    scores = np.concatenate([pairs.chosen, pairs.rejected])
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
        "length_correlation": correlation(scores, np.concatenate([pairs.chosen_lengths, pairs.rejected_lengths])),
        "accuracy_chosen_shorter": accuracy(margins[gaps < 0]).mean if (gaps < 0).any() else None,
        "accuracy_chosen_longer": accuracy(margins[gaps > 0]).mean if (gaps > 0).any() else None,
        "accuracy_of_longer": accuracy(gaps).mean,
    }
    return {key: value for key, value in numbers.items() if value is not None}


def accuracy(margins: ndarray) -> Proportion:
    """Return the share of pairs whose chosen answer scores higher, equal scores half, with Wilson's interval."""
    return wilson_interval(float(((margins > 0) + 0.5 * (margins == 0)).mean()), len(margins))


def reliability(margins: ndarray, bins: int = BINS) -> Reliability:
    """Return how often the first of two answers was the chosen one, by sigmoid(first score - second score).

    Each pair counts in both orders: in the order given alone, the first answer would always be the chosen one.
    """
    predicted = _sigmoid(np.concatenate([margins, -margins]))
    was_chosen = np.arange(2 * len(margins)) < len(margins)
    bin_indices = np.minimum((predicted * bins).astype(int), bins - 1)
    counts = np.bincount(bin_indices, minlength=bins)
    filled = counts > 0
    means = [np.bincount(bin_indices, weights, bins)[filled] / counts[filled] for weights in (predicted, was_chosen)]
    return Reliability(means[0], means[1], counts[filled])


def calibration_error(curve: Reliability) -> float:
    """Return the expected calibration error: mean |prediction - frequency| (Guo et al. 2017, equation 3)."""
    return float(np.average(np.abs(curve.predicted - curve.observed), weights=curve.counts))


def brier(margins: ndarray) -> float:
    """Return the mean squared error of sigmoid(margin) as the probability of the chosen answer (Brier 1950)."""
    return float(((1 - _sigmoid(margins)) ** 2).mean())


def _sigmoid(values: ndarray) -> ndarray:
    return np.exp(-np.logaddexp(0, -values))
