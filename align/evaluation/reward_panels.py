"""Pictures of how well scores rank pairs, each drawn on one panel beside the training curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from align.evaluation.reward_ranking import Pairs, calibration_error, reliability
from align.statistics import wilson_interval

_BARS = 30


def panels_of(pairs: Pairs) -> tuple[Callable[[Any], None], ...]:
    """What draws the reliability curve and the histogram of scores on a matplotlib Axes."""
    return (lambda axes: draw_reliability(axes, pairs), lambda axes: draw_histogram(axes, pairs))


def draw_reliability(axes: Any, pairs: Pairs) -> None:
    """Observed against predicted preference with 95% intervals; the area of a point is its share of the pairs."""
    curve = reliability(pairs.margins)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect")
    shares = [wilson_interval(*bin_) for bin_ in zip(curve.observed, curve.counts, strict=True)]
    ends = [[share.mean - share.low for share in shares], [share.high - share.mean for share in shares]]
    # Rounding may leave an end of an interval a hair on the wrong side of its middle.
    axes.errorbar(curve.predicted, curve.observed, np.maximum(ends, 0), color="C1", linewidth=1, linestyle="none")
    sizes = 10 + 300 * curve.counts / curve.counts.sum()
    axes.scatter(curve.predicted, curve.observed, s=sizes, color="C1", alpha=0.7, label="held out", zorder=3)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_title(f"calibration (ECE {calibration_error(curve):.3f})", fontsize=10)
    axes.set_xlabel("predicted: sigmoid(margin)", fontsize=8)
    axes.set_ylabel("was chosen", fontsize=8)
    _finish(axes, "upper left")


def draw_histogram(axes: Any, pairs: Pairs) -> None:
    """Scores of chosen and rejected answers over common bars."""
    every = np.concatenate([pairs.chosen, pairs.rejected])
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, _BARS + 1)
    axes.hist(pairs.chosen, edges, alpha=0.55, color="C2", label="chosen")
    axes.hist(pairs.rejected, edges, alpha=0.55, color="C3", label="rejected")
    axes.set_title(f"scores of {len(pairs.chosen)} held-out pairs", fontsize=10)
    axes.set_xlabel("score", fontsize=8)
    axes.set_ylabel("answers", fontsize=8)
    _finish(axes, "best")


def _finish(axes: Any, place: str) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    legend = axes.legend(fontsize=8, loc=place)
    for handle in legend.legend_handles:
        handle.set_alpha(0.8)
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([25])
