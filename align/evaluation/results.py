"""Results with intervals, comparisons and slices, as plain data for tables, the report and the registry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from align.evaluation.judging import JudgedComparison
from align.evaluation.metric import Comparison, Metric, MetricEstimate, compare_metrics, estimate_metric
from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import reference_text
from align.evaluation.request import EvaluationData, EvaluationRequest
from align.evaluation.slices import Slices
from align.statistics import Resamples

Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Numbers:
    """All metrics of a model on some records, and their comparison with the first model's."""

    count: int
    estimates: dict[str, MetricEstimate]
    against: dict[str, Comparison]


@dataclass(frozen=True)
class ModelResult:
    """The results of one model."""

    requested: str
    reference: str
    digest: str | None
    stage: str
    overall: Numbers
    slices: dict[str, dict[str, Numbers]]
    """by column and value"""
    judged: list[JudgedComparison]
    notes: list[str]


@dataclass(frozen=True)
class Result:
    """An evaluation of models on the same records; the first is the baseline."""

    data: dict[str, Any]
    settings: dict[str, Any]
    models: list[ModelResult]
    notes: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def metrics(self) -> list[str]:
        """The metrics that some model has, most important first, in the order of the models."""
        merged: list[str] = []
        for model in self.models:
            index = 0
            for name in model.overall.estimates:
                if name not in merged:
                    merged.insert(index, name)
                index = merged.index(name) + 1
        return merged

    @property
    def headline(self) -> str:
        """The most important metric."""
        return self.metrics[0] if self.metrics else ""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; NaN is null."""
        models = [{"reference": model.reference, **model_values(self, model)} for model in self.models]
        fields = {key: getattr(self, key) for key in ("created", "data", "settings", "headline")}
        return to_json_values({**fields, "models": models, "notes": self.notes})


def summarise_runs(
    runs: Sequence[ModelRun],
    request: EvaluationRequest,
    data: EvaluationData,
    judged: dict[str, list[JudgedComparison]] | None = None,
) -> Result:
    """Return intervals, comparisons and slices of some runs."""
    models = [
        _summarise_run(run, runs[0], data.slices, (judged or {}).get(run.reference, []), request.seed) for run in runs
    ]
    return Result(data.description, request.settings_dict(), models, data.notes)


def _summarise_run(
    run: ModelRun, first: ModelRun, parts: Slices, judged: list[JudgedComparison], seed: int
) -> ModelResult:
    theirs = first.metrics if run is not first else {}
    whole = Resamples(len(run.completions), seed)
    sliced = {
        column: {value: _numbers_of_slice(run.metrics, theirs, indices, seed) for value, indices in values.items()}
        for column, values in parts.items()
    }
    manifest = run.checkpoint.manifest or {}
    return ModelResult(
        requested=run.requested,
        reference=run.reference,
        digest=run.checkpoint.digest,
        stage=manifest.get("stage", ""),
        overall=_numbers(run.metrics, theirs, whole),
        slices=sliced,
        judged=judged,
        notes=[*run.notes, *_partial_notes(run)],
    )


def _partial_notes(run: ModelRun) -> list[str]:
    """Return notes on metrics that do not cover every record: too long, without a reference, failed."""
    size = len(run.completions)
    partial = {name: metric.count for name, metric in run.metrics.items() if metric.count < size}
    return [f"{run.reference}: {name} is of {count} of {size} records" for name, count in partial.items()]


def _numbers_of_slice(ours: Metrics, theirs: Metrics, indices: Any, seed: int) -> Numbers:
    """Return the numbers on some of the records."""
    selected, first = ({name: one.select(indices) for name, one in of.items()} for of in (ours, theirs))
    return _numbers({name: one for name, one in selected.items() if one.count}, first, Resamples(len(indices), seed))


def _numbers(ours: Metrics, theirs: Metrics, resamples: Resamples) -> Numbers:
    estimates = {name: estimate_metric(metric, resamples) for name, metric in ours.items()}
    shared = {
        name: metric for name, metric in ours.items() if name in theirs and metric.shares_records_with(theirs[name])
    }
    against = {name: compare_metrics(metric, theirs[name], resamples) for name, metric in shared.items()}
    return Numbers(resamples.size, estimates, against)


def model_values(result: Result, model: ModelResult) -> dict[str, Any]:
    """Return one model's results as JSON files and evaluation records hold them."""
    first = result.models[0].reference
    return to_json_values(
        {
            "asked": model.requested,
            "digest": model.digest,
            "metrics": {name: asdict(one) for name, one in model.overall.estimates.items()},
            "against": None if model.reference == first else first,
            "comparison": {name: one.as_dict() for name, one in model.overall.against.items()},
            "judged": [one.as_dict() for one in model.judged],
            "slices": {
                column: {value: _slice(numbers) for value, numbers in values.items()}
                for column, values in model.slices.items()
            },
            "notes": model.notes,
        }
    )


def evaluation_record(result: Result, model: ModelResult) -> dict[str, Any]:
    """Return the evaluation record of one model, as the registry stores it beside the version."""
    headline_estimate = model.overall.estimates.get(result.headline)
    headline = None if headline_estimate is None else {"name": result.headline, **asdict(headline_estimate)}
    return to_json_values(
        {"headline": headline, "data": result.data, "settings": result.settings, **model_values(result, model)}
    )


def _slice(numbers: Numbers) -> dict[str, Any]:
    return {
        "n": numbers.count,
        "metrics": {name: asdict(one) for name, one in numbers.estimates.items()},
        "comparison": {name: one.as_dict() for name, one in numbers.against.items()},
    }


def to_json_values(value: Any) -> Any:
    """Return JSON values, None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): to_json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
