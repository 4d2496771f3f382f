"""A reward model on held-out pairs: accuracy, calibration and influence of length as numbers, messages and panels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy import ndarray

from align.models.adapters import LoadedBase
from align.statistics import Proportion, correlation, wilson_interval

if TYPE_CHECKING:
    from datasets import Dataset

BINS = 10
_WINDOW_PAIRS = 1000
"""pairs in memory at once"""
_LENGTH_CORRELATION = 0.5
"""correlation of score and length that is reported, where it is also twice what so few answers have by chance"""
_BARS = 30


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


@dataclass(frozen=True)
class RewardReport:
    """Numbers, panels and messages about held-out pairs; a panel draws on a matplotlib Axes."""

    numbers: dict[str, float]
    panels: tuple[Callable[[Any], None], ...]
    messages: list[str]


def report_held_out(loaded: LoadedBase, rows: Dataset | None, size: int) -> RewardReport:
    """Score rows of `chosen_ids`, `rejected_ids` and `prompt_length`, `size` answers a pass, and report on them.

    The report is empty without rows.
    """
    from align.models.head_scores import score_sequences

    if rows is None:
        return RewardReport({}, (), [])
    windows: list[list[ndarray]] = []
    for start in range(0, len(rows), _WINDOW_PAIRS):
        window = rows[start : start + _WINDOW_PAIRS]
        scores = score_sequences(loaded, window["chosen_ids"] + window["rejected_ids"], size)
        prompts = np.array(window["prompt_length"])
        lengths = [np.array([len(ids) for ids in window[side]]) - prompts for side in ("chosen_ids", "rejected_ids")]
        windows.append([*np.split(scores, 2), *lengths])
    pairs = ScoredPairs(*map(np.concatenate, zip(*windows, strict=True)))
    numbers = describe_pairs(pairs)
    return RewardReport(numbers, draw_functions(pairs), held_out_messages(numbers))


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


def held_out_messages(numbers: dict[str, float]) -> list[str]:
    """Return the accuracy with its interval and whether it is chance, and a warning where scores follow length."""
    share = Proportion(*(numbers[f"held_out_accuracy{end}"] for end in ("", "_low", "_high")))
    chance = "; that is no better than a coin" if share.low <= 0.5 <= share.high else ""
    messages = [f"held out: {numbers['held_out_pairs']:.0f} pairs, accuracy {share}{chance}"]
    correlation = numbers.get("length_correlation", 0.0)
    by_chance = (2 * numbers["held_out_pairs"]) ** -0.5
    if abs(correlation) >= max(_LENGTH_CORRELATION, 2 * by_chance):
        messages.append(
            f"held out: scores follow the length of answers (correlation {correlation:.2f}; preferring the longer "
            f"answer alone is right in {numbers['accuracy_of_longer']:.0%}); look at accuracy_chosen_shorter"
        )
    return messages


def draw_functions(pairs: ScoredPairs) -> tuple[Callable[[Any], None], ...]:
    """Return the functions that draw the reliability curve and the histogram of scores on a matplotlib Axes."""
    return (partial(_draw_reliability, pairs), partial(_draw_histogram, pairs))


def _draw_reliability(pairs: ScoredPairs, axes: Any) -> None:
    """Observed against predicted preference with 95% intervals; the area of a point is its share of the pairs."""
    curve = reliability(pairs.margins)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect")
    shares = [wilson_interval(*bin_) for bin_ in zip(curve.observed, curve.counts, strict=True)]
    ends = [[share.mean - share.low for share in shares], [share.high - share.mean for share in shares]]
    # Rounding may leave an end of an interval slightly on the wrong side of its middle.
    axes.errorbar(curve.predicted, curve.observed, np.maximum(ends, 0), color="C1", linewidth=1, linestyle="none")
    sizes = 10 + 300 * curve.counts / curve.counts.sum()
    axes.scatter(curve.predicted, curve.observed, s=sizes, color="C1", alpha=0.7, label="held out", zorder=3)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    titles = (f"calibration (ECE {calibration_error(curve):.3f})", "predicted: sigmoid(margin)", "was chosen")
    _finish(axes, *titles, "upper left")


def _draw_histogram(pairs: ScoredPairs, axes: Any) -> None:
    """Scores of chosen and rejected answers over common bars."""
    scores = np.concatenate([pairs.chosen, pairs.rejected])
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1, _BARS + 1)
    axes.hist(pairs.chosen, edges, alpha=0.55, color="C2", label="chosen")
    axes.hist(pairs.rejected, edges, alpha=0.55, color="C3", label="rejected")
    _finish(axes, f"scores of {len(pairs.chosen)} held-out pairs", "score", "answers", "best")


def _finish(axes: Any, title: str, x_label: str, y_label: str, location: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    legend = axes.legend(fontsize=8, loc=location)
    for handle in legend.legend_handles:
        handle.set_alpha(0.8)
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([25])
