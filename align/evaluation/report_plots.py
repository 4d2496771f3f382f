"""Plots as inline SVG in percent of their box, so that they fit any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.evaluation.html_markup import Html, join, tag
from align.evaluation.metric import Better, Comparison, MetricEstimate

_BINS = 24


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`."""

    low: float
    high: float

    def at(self, value: float) -> str:
        """Return the position of a value in percent of the width."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(1.0, max(0.0, share)):.2f}%"

    def ticks(self) -> list[float]:
        """Return three to six round values."""
        raw = (self.high - self.low) / 4
        size = 10 ** math.floor(math.log10(raw))
        step = min((size * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - raw))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


def scale_of(estimates: Sequence[MetricEstimate]) -> Scale:
    """Return an axis for estimates with intervals: 0 to 1 for shares, else with a margin."""
    values = [v for one in estimates for v in (one.value, one.low, one.high) if math.isfinite(v)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= 0 and high <= 1:
        return Scale(0.0, 1.0)
    margin = 0.08 * (high - low) or abs(high) or 1.0
    return Scale(0.0 if 0 <= low < margin * 3 else low - margin, high + margin)


def interval(estimate: MetricEstimate, scale: Scale, colour: int) -> Html:
    """Return a dot on a line from the lower to the upper end."""
    parts = [*_grid(scale)]
    if math.isfinite(estimate.low):
        ends = {"x1": scale.at(estimate.low), "x2": scale.at(estimate.high)}
        parts.append(tag("line", **ends, y1="50%", y2="50%", class_=f"whisker c{colour}"))
    parts.append(tag("circle", cx=scale.at(estimate.value), cy="50%", r="5.5", class_=f"dot c{colour}"))
    return _svg(parts, "track", f"{estimate}")


def axis(scale: Scale) -> Html:
    """Return the tick labels of a scale."""
    ticks = scale.ticks()
    texts = [tag("text", f"{tick:g}", x=scale.at(tick), y="13", text_anchor=_anchor(tick, scale)) for tick in ticks]
    return _svg(texts, "axis", "")


def difference(estimate: Comparison, limit: float) -> Html:
    """Return the interval of a difference around a line at 0, on an axis from -limit to limit."""
    scale = Scale(-limit, limit)
    kind = {"better": "good", "worse": "bad"}.get(estimate.verdict, "even")
    parts = [tag("line", x1="50%", x2="50%", y1="8%", y2="92%", class_="zero")]
    if math.isfinite(estimate.low):
        ends = {"x1": scale.at(estimate.low), "x2": scale.at(estimate.high)}
        parts.append(tag("line", **ends, y1="50%", y2="50%", class_=f"whisker {kind}"))
    parts.append(tag("circle", cx=scale.at(estimate.difference), cy="50%", r="5", class_=f"dot {kind}"))
    return _svg(parts, "track", f"{estimate.difference:+.4g}")


def win_bar(wins: int, ties: int, losses: int, better: Better = "higher") -> Html:
    """Return wins, ties and losses as parts of a bar, grey where no direction is better."""
    kinds = ("plain", "even", "faint") if better is None else ("good", "even", "bad")
    total, left, parts = max(1, wins + ties + losses), 0.0, []
    for count, kind in zip((wins, ties, losses), kinds, strict=True):
        width = 100 * count / total
        parts.append(tag("rect", x=f"{left:.2f}%", y="30%", width=f"{width:.2f}%", height="40%", class_=f"bar {kind}"))
        left += width
    return _svg(parts, "track", f"{wins} won, {ties} tied, {losses} lost")


def histogram(rows: np.ndarray, scale: Scale, colour: int) -> Html:
    """Return a histogram of values."""
    counts, _ = np.histogram(rows[np.isfinite(rows)], bins=_BINS, range=(scale.low, scale.high))
    limit, width = max(1, int(counts.max())), 100 / _BINS
    bars = [
        tag(
            "rect", x=f"{index * width + 0.2:.2f}%", y=f"{100 - 92 * count / limit:.2f}%", width=f"{width - 0.4:.2f}%",
            height=f"{92 * count / limit:.2f}%", class_=f"bar c{colour}",
        )
        for index, count in enumerate(counts.tolist())
        if count
    ]  # fmt: skip
    return _svg([*_grid(scale), *bars], "histogram", "")


def _grid(scale: Scale) -> list[Html]:
    return [tag("line", x1=scale.at(t), x2=scale.at(t), y1="0", y2="100%", class_="grid") for t in scale.ticks()]


def _anchor(tick: float, scale: Scale) -> str:
    share = (tick - scale.low) / (scale.high - scale.low)
    return "start" if share < 0.03 else "end" if share > 0.97 else "middle"


def _svg(parts: Sequence[Html], kind: str, label: str) -> Html:
    role = {"role": "img", "aria_label": label} if label else {"aria_hidden": "true"}
    return tag("svg", join(*parts), class_=kind, **role)
