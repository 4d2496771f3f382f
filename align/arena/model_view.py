"""One model as HTML: lineage, training curves and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from align.arena.leaderboard_view import placeholder
from align.arena.page_text import PAGE_TEXTS
from align.registry import Ancestor, Checkpoint, Registry
from align.training.curves import Series, panels, read_log

Words = dict[str, str]

_WIDTH, _HEIGHT, _LEFT, _MARGIN = 300, 120, 58, 6
"""of a chart, in SVG units; the ends of the scale are left of the plot"""
_MAX_POINTS = 300
_MAX_DOTS = 12


def model_html(registry: Registry, reference: str, language: str) -> str:
    """Return lineage, training curves and metrics of a registered model."""
    words = PAGE_TEXTS[language]
    checkpoint = registry.resolve(reference)
    tree = f'<ul class="tree">{_lineage_html(registry.lineage(checkpoint))}</ul>'
    return (
        f'<div class="two"><div><h3>{escape(words["lineage"])}</h3>{tree}</div>'
        f"<div><h3>{escape(words['figures'])}</h3>{_metrics_html(checkpoint)}</div></div>"
        f"<h3>{escape(words['curves'])}</h3>{_curves_html(checkpoint, words)}"
    )


def _lineage_html(node: Ancestor) -> str:
    digest = (node.digest or "").removeprefix("sha256:")[:12]
    chips = "".join(f'<span class="chip">{escape(text)}</span>' for text in (node.stage, node.note) if text)
    above = "".join(map(_lineage_html, node.parents))
    return (
        f"<li><b>{escape(node.reference)}</b>{chips} <code>{escape(digest)}</code>"
        + (f'<ul class="tree">{above}</ul>' if above else "")
        + "</li>"
    )


def _metrics_html(checkpoint: Checkpoint) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in _metric_rows(checkpoint)
    )
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def _metric_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    manifest: dict[str, Any] = checkpoint.manifest or {}
    yield "kind", checkpoint.kind
    for entry in manifest.get("data") or []:
        yield "data", f"{entry.get('name')} ({entry.get('rows')})"
    for name, value in (manifest.get("metrics") or {}).items():
        if isinstance(value, int | float):
            yield name, f"{value:.4g}"


def _curves_html(checkpoint: Checkpoint, words: Words) -> str:
    log = Path(checkpoint.location) / "metrics.jsonl"
    shown = panels(read_log(log)) if not checkpoint.is_hub and log.is_file() else {}
    if not shown:
        return placeholder(words["no_curves"])
    return f'<div class="charts">{"".join(_chart_svg(title, kinds, words) for title, kinds in shown.items())}</div>'


def _chart_svg(title: str, kinds: Series, words: Words) -> str:
    """Return a small line chart, held-out values dashed."""
    points = {kind: _finite_points(series) for kind, series in kinds.items()}
    every = [point for series in points.values() for point in series]
    if not every:
        return ""
    steps, values = zip(*every, strict=True)
    last, low, high = max(steps), min(values), max(values)
    lines = "".join(
        _curve(series, (last, low, high), "held" if kind == "held out" else "trained")
        for kind, series in points.items()
    )
    key = words["curve_eval"] if "held out" in kinds else words["curve_training"]
    label = f"{title} ({' + '.join(dict.fromkeys((words['curve_training'], key)))}): {low:.4g} … {high:.4g}"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 16}" role="img" aria-label="{escape(label)}">'
        f'<rect class="plot" x="{_LEFT}" width="{_WIDTH - _LEFT}" height="{_HEIGHT}" rx="4"/>{lines}'
        f'<text class="end" x="{_LEFT - 6}" y="12">{high:.3g}</text>'
        f'<text class="end" x="{_LEFT - 6}" y="{_HEIGHT - 3}">{low:.3g}</text>'
        f'<text class="end" x="{_WIDTH}" y="{_HEIGHT + 13}">{escape(words["step"])} {last:g}</text></svg></figure>'
    )


def _finite_points(series: tuple[list[int], list[float]]) -> list[tuple[float, float]]:
    points = [(float(step), value) for step, value in zip(*series, strict=True) if math.isfinite(value)]
    return points[:: math.ceil(len(points) / _MAX_POINTS) or 1]


def _curve(series: list[tuple[float, float]], ends: tuple[float, float, float], kind: str) -> str:
    last, low, high = ends
    wide, tall = _WIDTH - _LEFT - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    points = [
        (
            _LEFT + _MARGIN + wide * step / max(last, 1e-9),
            _MARGIN + tall * (1 - ((value - low) / (high - low) if high > low else 0.5)),
        )
        for step, value in series
    ]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points if len(points) <= _MAX_DOTS
    )
    return f'<polyline class="{kind}" points="{drawn}"/>{dots}'
