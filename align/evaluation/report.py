"""Scores as a table for people and as JSON for programs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from align.evaluation.metrics import Interval

if TYPE_CHECKING:
    from align.evaluation.scores import ModelScore

_WIDTH = 110


def render_table(scores: Sequence[ModelScore], title: str, kl_label: str = "KL") -> str:
    """A table of one row a model: gold score and distance with 95% intervals, parts as shares."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("model")
    parts = list(scores[0].parts)
    for name in ("gold score [95%]", *(part.replace("_", " ") for part in parts), "tokens", kl_label):
        table.add_column(name, justify="right")
    for score in scores:
        shares = [f"{score.parts[part]:.0%}" for part in parts]
        table.add_row(score.label, str(score.gold), *shares, f"{score.length.mean:.1f}", _show_kl(score.kl))
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue()


def to_json(scores: Sequence[ModelScore]) -> list[dict[str, Any]]:
    """The same numbers, with samples, as plain data."""
    return [asdict(score) for score in scores]


def _show_kl(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.2f} ± {interval.high - interval.mean:.2f}"
