"""A reward model on held-out pairs: numbers, messages, and panels beside the training curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from align.evaluation.reward_ranking import ScoredPairs, calibration_error, describe_pairs, reliability
from align.models.scorer import score_sequences
from align.statistics import Proportion, wilson_interval

if TYPE_CHECKING:
    from datasets import Dataset

    from align.models.adapters import LoadedBase

_WINDOW_PAIRS = 1000
"""pairs in memory at once"""
_LENGTH_CORRELATION = 0.5
"""correlation of score and length that is reported, where it is also twice what so few answers have by chance"""
_BARS = 30


@dataclass(frozen=True)
class RewardReport:
    """Numbers, panels and messages about held-out pairs; a panel draws on a matplotlib Axes."""

    numbers: dict[str, float]
    panels: tuple[Callable[[Any], None], ...]
    messages: list[str]


def report_held_out(loaded: LoadedBase, rows: Dataset | None, size: int) -> RewardReport:
    """Score joined pairs, `size` answers a pass, and report on them; the report is empty without pairs."""
    if rows is None:
        return RewardReport({}, (), [])
    pairs = _score_pairs(loaded, rows, size)
    numbers = describe_pairs(pairs)
    return RewardReport(numbers, draw_functions(pairs), held_out_messages(numbers))


def _score_pairs(loaded: LoadedBase, rows: Dataset, size: int) -> ScoredPairs:
    """Score rows of `chosen_ids`, `rejected_ids` and `prompt_length`."""
    windows: list[list[np.ndarray]] = []
    for start in range(0, len(rows), _WINDOW_PAIRS):
        window = rows[start : start + _WINDOW_PAIRS]
        scores = score_sequences(loaded, window["chosen_ids"] + window["rejected_ids"], size)
        prompts = np.array(window["prompt_length"])
        lengths = [np.array([len(ids) for ids in window[side]]) - prompts for side in ("chosen_ids", "rejected_ids")]
        windows.append([*np.split(scores, 2), *lengths])
    return ScoredPairs(*map(np.concatenate, zip(*windows, strict=True)))


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
    return (lambda axes: _draw_reliability(axes, pairs), lambda axes: _draw_histogram(axes, pairs))


def _draw_reliability(axes: Any, pairs: ScoredPairs) -> None:
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
    axes.set_title(f"calibration (ECE {calibration_error(curve):.3f})", fontsize=10)
    axes.set_xlabel("predicted: sigmoid(margin)", fontsize=8)
    axes.set_ylabel("was chosen", fontsize=8)
    _finish(axes, "upper left")


def _draw_histogram(axes: Any, pairs: ScoredPairs) -> None:
    """Scores of chosen and rejected answers over common bars."""
    scores = np.concatenate([pairs.chosen, pairs.rejected])
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1, _BARS + 1)
    axes.hist(pairs.chosen, edges, alpha=0.55, color="C2", label="chosen")
    axes.hist(pairs.rejected, edges, alpha=0.55, color="C3", label="rejected")
    axes.set_title(f"scores of {len(pairs.chosen)} held-out pairs", fontsize=10)
    axes.set_xlabel("score", fontsize=8)
    axes.set_ylabel("answers", fontsize=8)
    _finish(axes, "best")


def _finish(axes: Any, location: str) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    legend = axes.legend(fontsize=8, loc=location)
    for handle in legend.legend_handles:
        handle.set_alpha(0.8)
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([25])
