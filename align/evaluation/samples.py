"""Single records: every completion with its metrics, the worst ones and the regressions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import reference_text
from align.evaluation.request import EvaluationData
from align.evaluation.results import to_json_values


def sample_rows(runs: Sequence[ModelRun], data: EvaluationData) -> Iterator[dict[str, Any]]:
    """Yield JSON values of every completion of every model, record by record."""
    for index, record in enumerate(data.records):
        for run in runs:
            completion = run.completions[index]
            yield {
                "record": record.id or record.where,
                "model": run.reference,
                "prompt": record.prompt,
                "reference": reference_text(record),
                "completion": None if completion is None else completion.text_with_reasoning,
                **({"answer": completion.text} if completion is not None and completion.has_reasoning else {}),
                "ended": None if completion is None else completion.ended,
                "numbers": numbers_at(run, index),
            }


def numbers_at(run: ModelRun, index: int) -> dict[str, float]:
    """Return the metrics that apply to one record, by name."""
    values = {name: float(metric.rows[index]) for name, metric in run.metrics.items()}
    return {name: value for name, value in to_json_values(values).items() if value is not None}


def find_worst(run: ModelRun, metric: str, count: int) -> list[int]:
    """Return the indices of a model's worst records, worst first; of equals the longer answer."""
    rows = run.metrics[metric].rows * (-1 if run.metrics[metric].better == "lower" else 1)
    answered = [index for index in np.flatnonzero(np.isfinite(rows)).tolist() if run.completions[index] is not None]
    return sorted(answered, key=lambda index: (rows[index], -_token_count(run, index)))[:count]


def find_regressions(run: ModelRun, first: ModelRun, metric: str, count: int) -> list[int]:
    """Return the indices of the records on which a model lost against the first one, largest loss first."""
    ours, theirs = run.metrics[metric], first.metrics[metric]
    losses = (theirs.rows - ours.rows) * (-1 if ours.better == "lower" else 1)
    indices = np.flatnonzero(np.nan_to_num(losses, nan=0.0) > 0).tolist()
    return sorted((index for index in indices if run.completions[index]), key=lambda index: -losses[index])[:count]


def _token_count(run: ModelRun, index: int) -> int:
    completion = run.completions[index]
    return 0 if completion is None else completion.tokens
