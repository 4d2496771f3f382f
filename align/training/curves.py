"""Training curves as one picture beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

_FIRST = ("loss", "eval_loss", "accuracy", "eval_accuracy", "rewards/accuracies", "rewards/margins", "score_mean", "kl")
_LEFT_OUT = {"step", "epoch", "num_tokens", "tokens_per_second"}
_PANELS = 9


def read_log(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The series of a metrics.jsonl: key to (steps, values)."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key not in _LEFT_OUT and isinstance(value, int | float):
                steps, values = series.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def draw_curves(log: Path, target: Path, *, title: str) -> None:
    """Draw up to nine series of a log as small panels, the ones that matter most first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_log(log)
    keys = sorted(series, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key))[:_PANELS]
    columns = min(3, max(1, len(keys)))
    rows = max(1, -(-len(keys) // columns))
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for position, key in enumerate(keys, start=1):
        axes = figure.add_subplot(rows, columns, position)
        steps, values = series[key]
        axes.plot(steps, values, marker="o" if len(steps) == 1 else None, linewidth=1.4)
        axes.set_title(key, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=90)
