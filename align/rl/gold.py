"""A gold score beside the proxy that is trained on, to see over-optimisation (Gao et al. 2023, arXiv:2210.10760).

Gold rewards score what is sampled and are logged; the training never reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.rewards import RewardContext
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.schema import Record

_KEYS = ("kl", "score_mean", "gold_mean")


class GoldRewards:
    """Rewards that are measured on each rollout and never trained on; there may be none.

    Raises UsageError for an unknown name or a wrong argument.
    """

    def __init__(self, settings: Sequence[RewardSettings]):
        self._rewards = WeightedRewards(settings, "gold")

    def load(self, context: RewardContext, records: Sequence[Record]) -> None:
        """Load the models that rewards read; DataError for the first record that lacks a field some reward needs."""
        self._rewards.check(records)
        self._rewards.load(context)

    def measure(self, records: Sequence[Record], completions: Sequence[str]) -> dict[str, float]:
        """Return the mean over a rollout as `gold_mean`, and each part as `gold/NAME` where there are several.

        A reward that draws random numbers leaves those of the training as they were.
        """
        from align.rl.ppo_state import untouched_random_states

        names = self._rewards.names
        if not names:
            return {}
        with untouched_random_states():
            values = self._rewards.score_all(records, completions)
        parts = {f"gold/{name}": sum(value[name] for value in values) / len(values) for name in names}
        mean = sum(map(self._rewards.total, values)) / len(values)
        return {"gold_mean": mean} | (parts if len(names) > 1 else {})

    def panels(self, log: Path) -> tuple[Callable[[Any], None], ...]:
        """Return the functions that draw proxy and gold against KL from a metrics.jsonl on a matplotlib Axes."""
        return (lambda axes: draw_against_kl(axes, log),) if self._rewards.names else ()


def read_points(log: Path) -> list[tuple[float, float, float]]:
    """Return KL, proxy score and gold score of every logged step that has all three, in order."""
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [(row["kl"], row["score_mean"], row["gold_mean"]) for row in rows if all(key in row for key in _KEYS)]


def draw_against_kl(axes: Any, log: Path) -> None:
    """Draw proxy score (left scale) and gold score (right scale) over the KL of their rollout.

    A step is a point, the later the darker. A curve is the mean of a tenth of the steps, in the order of their KL.
    """
    points = sorted((*point, step) for step, point in enumerate(read_points(log), start=1))
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left, bottom, 0.84 * width, height))  # room for the second scale
    size = -(-len(points) // 10) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    shades = [0.1 + 0.5 * point[3] / len(points) for point in points]
    for scale, column, color, name in ((axes, 1, "C0", "proxy"), (axes.twinx(), 2, "C1", "gold")):
        if points:
            scale.scatter([p[0] for p in points], [p[column] for p in points], s=9, color=color, alpha=shades)
        kl, score = ([_mean(part, index) for part in parts] for index in (0, column))
        scale.plot(kl, score, color=color, linewidth=1.6)
        scale.set_ylabel(name, fontsize=8, color=color)
        scale.tick_params(labelsize=8)
        scale.tick_params(axis="y", labelcolor=color)
    axes.set_title("proxy and gold score against KL", fontsize=10)
    axes.set_xlabel("KL from the reference, nats a completion", fontsize=8)
    axes.grid(alpha=0.3)


def _mean(points: Sequence[tuple[float, ...]], column: int) -> float:
    return sum(point[column] for point in points) / len(points)
