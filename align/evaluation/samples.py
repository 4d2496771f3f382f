"""Single records again: every completion with its numbers, and those that are worth a look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import reference_text
from align.evaluation.request import EvaluationData
from align.evaluation.results import plain


def sample_rows(runs: Sequence[ModelRun], material: EvaluationData) -> Iterator[dict[str, Any]]:
    """A row of JSON values for every completion of every model, record by record."""
    for place, record in enumerate(material.records):
        for run in runs:
            written = run.written[place]
            yield {
                "record": record.id or record.where,
                "model": run.reference,
                "prompt": record.prompt,
                "reference": reference_text(record),
                "completion": None if written is None else written.whole,
                **({"answer": written.text} if written is not None and written.reasons else {}),
                "ended": None if written is None else written.ended,
                "numbers": numbers_at(run, place),
            }


def numbers_at(run: ModelRun, place: int) -> dict[str, float]:
    """The measures that apply to one record, by name."""
    found = {name: float(measure.rows[place]) for name, measure in run.measures.items()}
    return {name: value for name, value in plain(found).items() if value is not None}


def worst(run: ModelRun, measure: str, count: int) -> list[int]:
    """The places of the records on which a model did worst, the worst first; of equals the longer answer."""
    rows = run.measures[measure].rows * (-1 if run.measures[measure].better == "lower" else 1)
    known = [place for place in np.flatnonzero(np.isfinite(rows)).tolist() if run.written[place] is not None]
    return sorted(known, key=lambda place: (rows[place], -_size(run, place)))[:count]


def regressions(run: ModelRun, first: ModelRun, measure: str, count: int) -> list[int]:
    """The places on which a model lost most against the first one, the largest loss first; only real losses."""
    ours, theirs = run.measures[measure], first.measures[measure]
    losses = (theirs.rows - ours.rows) * (-1 if ours.better == "lower" else 1)
    places = np.flatnonzero(np.nan_to_num(losses, nan=0.0) > 0).tolist()
    return sorted((place for place in places if run.written[place]), key=lambda place: -losses[place])[:count]


def _size(run: ModelRun, place: int) -> int:
    written = run.written[place]
    return 0 if written is None else written.tokens
