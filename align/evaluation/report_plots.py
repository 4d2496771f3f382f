"""HTML and plots of the report: a builder that escapes all text, and inline SVG in percent of its box.

Control characters are made visible; plots fit any width.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.evaluation.metric import Better, Comparison, MetricEstimate

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_EMPTY = {"meta", "line", "circle", "rect", "polyline", "path"}
_BINS = 24


class Html(str):
    """Markup that is escaped already."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Return escaped text, control and bidirectional characters replaced."""
    return Html(html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text), quote=True))


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """Return an element; children other than `Html` are escaped, `class_` is class and `data_x` data-x."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}/>" if name in _EMPTY else f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Return the concatenation of several children."""
    return Html("".join(child if isinstance(child, Html) else escaped(child) for child in children if child))


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Return the position of a value, 0 to 1 within the axis."""
        return (value - self.low) / (self.high - self.low)

    def at(self, value: float) -> str:
        """Return the position of a value in percent of the width."""
        return f"{100 * min(1.0, max(0.0, self.share(value))):.2f}%"

    def ticks(self) -> list[float]:
        """Return three to six round values."""
        raw = (self.high - self.low) / 4
        size = 10 ** math.floor(math.log10(raw))
        step = min((size * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - raw))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


def scale_of(estimates: Sequence[MetricEstimate | None]) -> Scale:
    """Return an axis for estimates with intervals: 0 to 1 for shares, else with a margin."""
    values = [v for one in estimates if one for v in (one.value, one.low, one.high) if math.isfinite(v)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= 0 and high <= 1:
        return Scale(0.0, 1.0)
    margin = 0.08 * (high - low) or abs(high) or 1.0
    return Scale(0.0 if 0 <= low < margin * 3 else low - margin, high + margin)


def interval(estimate: MetricEstimate, scale: Scale, colour: int) -> Html:
    """Return a dot on a line from the lower to the upper end."""
    ends = (estimate.low, estimate.value, estimate.high)
    return _svg([*_grid(scale), *_whisker(ends, scale, f"c{colour}", "5.5")], "track", f"{estimate}")


def difference(estimate: Comparison, limit: float) -> Html:
    """Return the interval of a difference around a line at 0, on an axis from -limit to limit."""
    zero = tag("line", x1="50%", x2="50%", y1="8%", y2="92%", class_="zero")
    kind = {"better": "good", "worse": "bad"}.get(estimate.verdict, "even")
    ends = (estimate.low, estimate.difference, estimate.high)
    return _svg([zero, *_whisker(ends, Scale(-limit, limit), kind, "5")], "track", f"{estimate.difference:+.4g}")


def _whisker(ends: tuple[float, float, float], scale: Scale, kind: str, radius: str) -> Iterator[Html]:
    low, middle, high = ends
    if math.isfinite(low):
        yield tag("line", x1=scale.at(low), x2=scale.at(high), y1="50%", y2="50%", class_=f"whisker {kind}")
    yield tag("circle", cx=scale.at(middle), cy="50%", r=radius, class_=f"dot {kind}")


def axis(scale: Scale) -> Html:
    """Return the tick labels of a scale."""
    texts = []
    for tick in scale.ticks():
        anchor = "start" if scale.share(tick) < 0.03 else "end" if scale.share(tick) > 0.97 else "middle"
        texts.append(tag("text", f"{tick:g}", x=scale.at(tick), y="13", text_anchor=anchor))
    return _svg(texts, "axis")


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
    return _svg([*_grid(scale), *bars], "histogram")


def _grid(scale: Scale) -> list[Html]:
    return [tag("line", x1=scale.at(t), x2=scale.at(t), y1="0", y2="100%", class_="grid") for t in scale.ticks()]


def _svg(parts: Sequence[Html], kind: str, label: str = "") -> Html:
    role = {"role": "img", "aria_label": label} if label else {"aria_hidden": "true"}
    return tag("svg", join(*parts), class_=kind, **role)
