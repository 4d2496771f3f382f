"""One model as HTML: what it was made from, how it was trained, and what came out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from align.arena.leaderboard_view import empty
from align.arena.page_text import PAGE_TEXTS
from align.registry import Ancestor, Checkpoint, Registry
from align.training.curves import Series, panels, read_log

Words = dict[str, str]

_WIDTH, _HEIGHT, _LEFT, _MARGIN = 300, 120, 58, 6
"""of a chart, in its own units; the ends of the scale stand left of the plot"""
_MOST_POINTS = 300
_FEW = 12


def sheet(registry: Registry, reference: str, language: str) -> str:
    """Lineage, training curves and results of a registered model."""
    words = PAGE_TEXTS[language]
    checkpoint = registry.resolve(reference)
    tree = f'<ul class="tree">{_branch(registry.lineage(checkpoint))}</ul>'
    return (
        f'<div class="two"><div><h3>{escape(words["lineage"])}</h3>{tree}</div>'
        f"<div><h3>{escape(words['figures'])}</h3>{_figures(checkpoint)}</div></div>"
        f"<h3>{escape(words['curves'])}</h3>{_curves(checkpoint, words)}"
    )


def _branch(node: Ancestor) -> str:
    digest = (node.digest or "").removeprefix("sha256:")[:12]
    chips = "".join(f'<span class="chip">{escape(text)}</span>' for text in (node.stage, node.note) if text)
    above = "".join(map(_branch, node.parents))
    return (
        f"<li><b>{escape(node.reference)}</b>{chips} <code>{escape(digest)}</code>"
        + (f'<ul class="tree">{above}</ul>' if above else "")
        + "</li>"
    )


def _figures(checkpoint: Checkpoint) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _facts(checkpoint)
    )
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def _facts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    manifest: dict[str, Any] = checkpoint.manifest or {}
    yield "kind", checkpoint.kind
    for entry in manifest.get("data") or []:
        yield "data", f"{entry.get('name')} ({entry.get('rows')})"
    for name, value in (manifest.get("metrics") or {}).items():
        if isinstance(value, int | float):
            yield name, f"{value:.4g}"


def _curves(checkpoint: Checkpoint, words: Words) -> str:
    log = Path(checkpoint.location) / "metrics.jsonl"
    shown = panels(read_log(log)) if not checkpoint.is_hub and log.is_file() else {}
    if not shown:
        return empty(words["no_curves"])
    return f'<div class="charts">{"".join(_chart(title, kinds, words) for title, kinds in shown.items())}</div>'


def _chart(title: str, kinds: Series, words: Words) -> str:
    """A small line chart; what was measured on held-out data is dashed."""
    points = {kind: _finite(series) for kind, series in kinds.items()}
    every = [point for series in points.values() for point in series]
    if not every:
        return ""
    steps, values = zip(*every, strict=True)
    last, low, high = max(steps), min(values), max(values)
    lines = "".join(
        _line(series, (last, low, high), "held" if kind == "held out" else "trained") for kind, series in points.items()
    )
    key = words["curve_eval"] if "held out" in kinds else words["curve_training"]
    told = f"{title} ({' + '.join(dict.fromkeys((words['curve_training'], key)))}): {low:.4g} … {high:.4g}"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 16}" role="img" aria-label="{escape(told)}">'
        f'<rect class="plot" x="{_LEFT}" width="{_WIDTH - _LEFT}" height="{_HEIGHT}" rx="4"/>{lines}'
        f'<text class="end" x="{_LEFT - 6}" y="12">{high:.3g}</text>'
        f'<text class="end" x="{_LEFT - 6}" y="{_HEIGHT - 3}">{low:.3g}</text>'
        f'<text class="end" x="{_WIDTH}" y="{_HEIGHT + 13}">{escape(words["step"])} {last:g}</text></svg></figure>'
    )


def _finite(series: tuple[list[int], list[float]]) -> list[tuple[float, float]]:
    points = [(float(step), value) for step, value in zip(*series, strict=True) if math.isfinite(value)]
    return points[:: math.ceil(len(points) / _MOST_POINTS) or 1]


def _line(series: list[tuple[float, float]], ends: tuple[float, float, float], kind: str) -> str:
    last, low, high = ends
    wide, tall = _WIDTH - _LEFT - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    spots = [
        (
            _LEFT + _MARGIN + wide * step / max(last, 1e-9),
            _MARGIN + tall * (1 - ((value - low) / (high - low) if high > low else 0.5)),
        )
        for step, value in series
    ]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = "".join(
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in spots[:12] if len(spots) <= 12
    )
    return f'<polyline class="{kind}" points="{drawn}"/>{dots}'
