"""Classification by likelihood: accuracy, precision, recall and F1 of the most likely label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.evaluation.metric import Metric, mean_metric
from align.statistics import SumsToValue


def classification_metrics(answers: Sequence[str], chosen: Sequence[str | None], labels: Sequence[str]) -> list[Metric]:
    """Return accuracy and macro precision, recall and F1 as scikit-learn defines them with `zero_division=0`.

    A record whose `chosen` is None is left out. Macro means are over the classes among answers or choices. By hand,
    because sums over records are what is resampled.
    """
    indices = {label: index for index, label in enumerate(labels)}
    size = len(labels)
    parts = np.zeros((len(answers), 3 * size))
    right = np.full(len(answers), np.nan)
    for row, (answer, choice) in enumerate(zip(answers, chosen, strict=True)):
        if choice is None:
            continue
        right[row] = float(answer == choice)
        parts[row, indices[answer]] = right[row]
        parts[row, size + indices[choice]] = 1
        parts[row, 2 * size + indices[answer]] = 1
    macros = [
        Metric(f"macro_{name}", parts, right, _macro(kind)) for kind, name in enumerate(("precision", "recall", "f1"))
    ]
    return [mean_metric("accuracy", right), *macros]


def _macro(kind: int) -> SumsToValue:
    """Return precision, recall or F1 as a function of sums (..., 3C) of right choices, choices and answers."""

    def of(sums: np.ndarray) -> np.ndarray:
        right, chosen, answers = np.split(sums, 3, axis=-1)
        above = 2 * right if kind == 2 else right
        below = (chosen, answers, chosen + answers)[kind]
        values = above / np.maximum(below, 1)
        occurs = (chosen + answers) > 0
        total = occurs.sum(axis=-1)
        mean = (values * occurs).sum(axis=-1) / np.maximum(total, 1)
        return np.where(total > 0, mean, np.nan)

    return of
