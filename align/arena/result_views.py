"""The leaderboard as HTML (strengths, pair records, warnings, agreement), and one model (lineage, curves, metrics)."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from align.arena.page_text import PAGE_TEXTS, Words
from align.arena.ranking import Leaderboard, Rating
from align.registry import Ancestor, Checkpoint, Registry
from align.training.curves import Series, panels, read_log

_WIDTH, _HEIGHT, _LEFT, _MARGIN = 300, 120, 58, 6
"""of a chart, in SVG units; the ends of the scale are left of the plot"""
_MAX_POINTS = 300
_MAX_DOTS = 12


def placeholder(text: str) -> str:
    """Return a tab's content when there is nothing to show but the reason."""
    return f'<div class="empty">{escape(text)}</div>'


def leaderboard_html(board: Leaderboard, language: str) -> str:
    """Return the leaderboard, best model first."""
    words = PAGE_TEXTS[language]
    if not board.standings:
        return placeholder(words["no_votes"])
    warnings = [words[f"warning_{warning.key}"].format(**warning.values) for warning in board.warnings]
    bias, facts = board.position_bias, []
    if bias is None:
        facts.append(_fact(words["position"], words["unknown_yet"]))
    else:
        share, low, high = bias.chance
        facts.append(_fact(words["position"], words["position_text"].format(share=share, low=low, high=high), share))
    for agreed, title, text in (
        (board.agreement, "agreement", "agreement_text"),
        (board.self_agreement, "self_agreement", "self_agreement_text"),
    ):
        told = words[text].format(**vars(agreed)) if agreed else words["unknown_yet"]
        facts.append(_fact(words[title], told, agreed.share if agreed else None))
    counted = words["votes_counted"].format(votes=board.votes, prompts=board.prompts)
    return (
        "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)
        + f"<h3>{escape(counted)}</h3>{_standings(board.standings, words)}"
        + f'<h3>{escape(words["matrix"])}</h3>{_matrix(board, words)}<div class="two">{"".join(facts)}</div>'
    )


def _standings(standings: list[Rating], words: Words) -> str:
    ends = [end for rating in standings for end in (rating.low, rating.high) if end is not None]
    reach = max([1.0, *map(abs, ends)]) * 1.05
    rows = ""
    for number, rating in enumerate(standings, start=1):
        if rating.strength is None or rating.low is None or rating.high is None:
            rank, strength = "–", f'<span class="calm">{escape(words["unranked"])}</span>'
        else:
            bar = _bar((rating.low, rating.strength, rating.high), reach)
            rank, strength = str(number), f"{rating.strength:+.2f} ({rating.low:+.2f} … {rating.high:+.2f}){bar}"
        rows += (
            f'<tr><td>{rank}</td><th scope="row">{escape(rating.reference)}</th><td class="strength">{strength}</td>'
            f"<td>{rating.votes}</td><td>{rating.wins} · {rating.ties} · {rating.losses}</td></tr>"
        )
    heads = ("standing_model", "standing_strength", "standing_votes", "standing_record")
    return _table(["", *(words[key] for key in heads)], rows)


def _bar(interval: tuple[float, float, float], reach: float) -> str:
    """Return an interval with its estimate on a scale from -reach to reach, the average marked."""
    low, middle, high = (f"{50 + 50 * max(-1.0, min(1.0, value / reach)):.2f}%" for value in interval)
    return (
        '<svg class="bar" aria-hidden="true"><line class="axis" x1="0" x2="100%" y1="13" y2="13"/>'
        '<line class="axis" x1="50%" x2="50%" y1="3" y2="23"/>'
        f'<line class="span" x1="{low}" x2="{high}" y1="13" y2="13"/><circle cx="{middle}" cy="13" r="5"/></svg>'
    )


def _matrix(board: Leaderboard, words: Words) -> str:
    names = [rating.reference for rating in board.standings]
    rows = ""
    for name in names:
        cells = (board.matrix.get(name, {}).get(other) for other in names)
        records = "".join(f"<td>{' · '.join(map(str, cell)) if cell else '–'}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{escape(name)}</th>{records}</tr>'
    return _table([words["standing_model"], *names], rows)


def _table(heads: list[str], rows: str) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _fact(title: str, text: str, share: float | None = None) -> str:
    """Return a text, with the share it is about on a scale."""
    meter = (
        ""
        if share is None
        else (
            '<svg class="meter" aria-hidden="true"><rect class="track" width="100%" height="8" rx="4"/>'
            f'<rect class="filled" width="{100 * share:.1f}%" height="8" rx="4"/></svg>'
        )
    )
    return f'<div><h3>{escape(title)}</h3>{meter}<p class="calm">{escape(text)}</p></div>'


def model_html(registry: Registry, reference: str, language: str) -> str:
    """Return lineage, training curves and metrics of a registered model."""
    words = PAGE_TEXTS[language]
    checkpoint = registry.resolve(reference)
    tree = f'<ul class="tree">{_lineage_html(registry.lineage(checkpoint))}</ul>'
    log = Path(checkpoint.location) / "metrics.jsonl"
    shown = panels(read_log(log)) if not checkpoint.is_hub and log.is_file() else {}
    charts = "".join(_chart_svg(title, kinds, words) for title, kinds in shown.items())
    return (
        f'<div class="two"><div><h3>{escape(words["lineage"])}</h3>{tree}</div>'
        f"<div><h3>{escape(words['figures'])}</h3>{_metrics_html(checkpoint)}</div></div>"
        f"<h3>{escape(words['curves'])}</h3>"
        + (f'<div class="charts">{charts}</div>' if shown else placeholder(words["no_curves"]))
    )


def _lineage_html(node: Ancestor) -> str:
    digest = (node.digest or "").removeprefix("sha256:")[:12]
    chips = "".join(f'<span class="chip">{escape(text)}</span>' for text in (node.stage, node.note) if text)
    above = f'<ul class="tree">{"".join(map(_lineage_html, node.parents))}</ul>' if node.parents else ""
    return f"<li><b>{escape(node.reference)}</b>{chips} <code>{escape(digest)}</code>{above}</li>"


def _metrics_html(checkpoint: Checkpoint) -> str:
    manifest: dict[str, Any] = checkpoint.manifest or {}
    rows: list[tuple[str, str]] = [("kind", checkpoint.kind)]
    rows += [("data", f"{entry.get('name')} ({entry.get('rows')})") for entry in manifest.get("data") or []]
    metrics = (manifest.get("metrics") or {}).items()
    rows += [(name, f"{value:.4g}") for name, value in metrics if isinstance(value, int | float)]
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def _chart_svg(title: str, kinds: Series, words: Words) -> str:
    """Return a small line chart, held-out values dashed."""
    points = {}
    for kind, series in kinds.items():
        finite = [(float(step), value) for step, value in zip(*series, strict=True) if math.isfinite(value)]
        points[kind] = finite[:: math.ceil(len(finite) / _MAX_POINTS) or 1]
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


def _curve(series: list[tuple[float, float]], ends: tuple[float, float, float], kind: str) -> str:
    last, low, high = ends
    wide, tall = _WIDTH - _LEFT - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    points = []
    for step, value in series:
        height = (value - low) / (high - low) if high > low else 0.5
        points.append((_LEFT + _MARGIN + wide * step / max(last, 1e-9), _MARGIN + tall * (1 - height)))
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points]
    return f'<polyline class="{kind}" points="{drawn}"/>{"".join(dots) if len(dots) <= _MAX_DOTS else ""}'
