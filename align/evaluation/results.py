"""Results with intervals, comparisons and slices, as plain data for tables, the report and the registry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from align.evaluation.metric import (
    Comparison,
    JudgedComparison,
    Metric,
    MetricEstimate,
    compare_metrics,
    estimate_metric,
)
from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import reference_text
from align.evaluation.request import EvaluationData, EvaluationRequest
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
        return next(iter(self.metrics), "")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; NaN is null."""
        models = [{"reference": model.reference, **_model_values(self, model)} for model in self.models]
        fields = {key: getattr(self, key) for key in ("created", "data", "settings", "headline")}
        return to_json_values({**fields, "models": models, "notes": self.notes})


def summarise_runs(
    runs: Sequence[ModelRun],
    request: EvaluationRequest,
    data: EvaluationData,
    judged: Mapping[str, list[JudgedComparison]] | None = None,
) -> Result:
    """Return intervals, comparisons and slices of some runs; `judged` is by reference."""
    models = []
    for run in runs:
        size, manifest = len(run.completions), run.checkpoint.manifest or {}
        metrics, theirs = run.metrics, runs[0].metrics if run is not runs[0] else {}
        slices = {
            column: {value: _numbers(metrics, theirs, indices, request.seed) for value, indices in values.items()}
            for column, values in data.slices.items()
        }
        # Some metrics do not cover every record: too long, without a reference, failed.
        partial = {name: metric.count for name, metric in metrics.items() if metric.count < size}
        model = ModelResult(
            requested=run.requested,
            reference=run.reference,
            digest=run.checkpoint.digest,
            stage=manifest.get("stage", ""),
            overall=_numbers(metrics, theirs, np.arange(size), request.seed),
            slices=slices,
            judged=(judged or {}).get(run.reference, []),
            notes=[
                *run.notes,
                *(f"{run.reference}: {name} is of {n} of {size} records" for name, n in partial.items()),
            ],
        )
        models.append(model)
    return Result(data.description, request.settings_dict(), models, data.notes)


def _numbers(ours: Metrics, theirs: Metrics, indices: np.ndarray, seed: int) -> Numbers:
    resamples = Resamples(len(indices), seed)
    ours = {name: part for name, metric in ours.items() if (part := metric.select(indices)).count}
    against = {
        name: compare_metrics(metric, other, resamples)
        for name, metric in ours.items()
        if name in theirs and metric.shares_records_with(other := theirs[name].select(indices))
    }
    return Numbers(len(indices), {name: estimate_metric(metric, resamples) for name, metric in ours.items()}, against)


def _model_values(result: Result, model: ModelResult) -> dict[str, Any]:
    first = result.models[0].reference
    return {
        "asked": model.requested,
        "digest": model.digest,
        "metrics": model.overall.estimates,
        "against": None if model.reference == first else first,
        "comparison": model.overall.against,
        "judged": model.judged,
        "slices": model.slices,
        "notes": model.notes,
    }


def evaluation_record(result: Result, model: ModelResult) -> dict[str, Any]:
    """Return the evaluation record of one model, as the registry stores it beside the version."""
    estimate = model.overall.estimates.get(result.headline)
    headline = None if estimate is None else {"name": result.headline, **vars(estimate)}
    about = {"headline": headline, "data": result.data, "settings": result.settings}
    return to_json_values({**about, **_model_values(result, model)})


def to_json_values(value: Any) -> Any:
    """Return results as JSON values, None for numbers that are not finite."""
    match value:
        case Numbers():
            return to_json_values({"n": value.count, "metrics": value.estimates, "comparison": value.against})
        case Comparison():
            return to_json_values({**vars(value), "verdict": value.verdict})
        case MetricEstimate() | JudgedComparison():
            return to_json_values(vars(value))
        case dict():
            return {str(key): to_json_values(inner) for key, inner in value.items()}
        case list() | tuple():
            return [to_json_values(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value


def sample_rows(runs: Sequence[ModelRun], data: EvaluationData) -> Iterator[dict[str, Any]]:
    """Yield JSON values of every completion of every model, record by record."""
    for index, record in enumerate(data.records):
        for run in runs:
            completion = run.completions[index]
            numbers = {name: float(metric.rows[index]) for name, metric in run.metrics.items()}
            yield {
                "record": record.id or record.where,
                "model": run.reference,
                "prompt": record.prompt,
                "reference": reference_text(record),
                "completion": None if completion is None else completion.text_with_reasoning,
                **({"answer": completion.text} if completion is not None and completion.has_reasoning else {}),
                "ended": None if completion is None else completion.ended,
                "numbers": {name: number for name, number in numbers.items() if math.isfinite(number)},
            }
