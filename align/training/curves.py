"""The training curves of a run as one figure beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ORDER = (
    "loss", "accuracy", "mean_token_accuracy", "rewards/accuracies", "rewards/margins", "score_mean", "reward", "kl",
    "entropy", "explained_variance", "completion_length", "share_without_eos", "policy_loss", "value_loss",
)  # fmt: skip
_NOT_DRAWN = {"step", "epoch", "num_tokens", "tokens_per_second"}
_TIMING_SUFFIXES = ("_runtime", "_per_second")
_EVAL = "eval_"
_MAX_PANELS = 9

Series = dict[str, tuple[list[int], list[float]]]


def read_log(path: Path) -> Series:
    """Return the series of a metrics.jsonl: key to (steps, values)."""
    series: Series = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key not in _NOT_DRAWN and not key.endswith(_TIMING_SUFFIXES) and isinstance(value, int | float):
                steps, values = series.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def panels(series: Series) -> dict[str, Series]:
    """Return up to nine panels, the most important first; training and held-out values of a metric share one."""
    shared: dict[str, Series] = {}
    for key, points in series.items():
        title, kind = (key.removeprefix(_EVAL), "held out") if key.startswith(_EVAL) else (key, "training")
        shared.setdefault(title, {})[kind] = points
    order = sorted(shared, key=lambda key: (_ORDER.index(key) if key in _ORDER else len(_ORDER), key))
    return {key: shared[key] for key in order[:_MAX_PANELS]}


def draw_curves(log: Path, target: Path, *, title: str, more: Sequence[Callable[[Any], None]] = ()) -> None:
    """Draw a log as small panels; each of `more` draws a panel of its own after them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(read_log(log))
    count = max(1, len(shown) + len(more))
    columns = min(3, count)
    rows = -(-count // columns)
    width, height = 4.2 * columns, 2.7 * rows + 0.5
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, y=1 - 0.12 / height, va="top")
    # Margins in inches: matplotlib's own layouts draw everything twice to find them.
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.2 / width, bottom=0.5 / height, top=1 - 0.75 / height, wspace=0.28, hspace=0.5
    )
    for position, (key, kinds) in enumerate(shown.items(), start=1):
        _draw_panel(figure.add_subplot(rows, columns, position), key, kinds)
    for position, draw in enumerate(more, start=len(shown) + 1):
        draw(figure.add_subplot(rows, columns, position))
    figure.savefig(target, dpi=90)


def _draw_panel(axes: Any, key: str, kinds: Series) -> None:
    from matplotlib.ticker import MaxNLocator

    for kind, (steps, values) in kinds.items():
        few = len(steps) <= 12
        axes.plot(
            steps, values, label=kind, linewidth=1.4, color="C0" if kind == "training" else "C1",
            marker="o" if few or kind != "training" else None, markersize=4 if few else 2.5,
        )  # fmt: skip
    axes.set_title(key, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if len(every := {step for steps, _ in kinds.values() for step in steps}) == 1:
        axes.set_xlim(min(every) - 1, min(every) + 1)
    axes.grid(alpha=0.3)
    if len(kinds) > 1 or "training" not in kinds:
        axes.legend(fontsize=8)
