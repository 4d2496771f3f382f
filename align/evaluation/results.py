"""Results: what was measured, with intervals, comparisons and slices, as plain data for tables, pages and records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from align.evaluation.judging import JudgedComparison
from align.evaluation.metric import Comparison, Metric, MetricEstimate, compare, estimate
from align.evaluation.model_runs import ModelRun
from align.evaluation.request import EvaluationData, EvaluationRequest
from align.evaluation.slices import Slices
from align.statistics import Resamples

Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Numbers:
    """Every measure of a model on some records, and each against the first model's."""

    count: int
    estimates: dict[str, MetricEstimate]
    against: dict[str, Comparison]


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model."""

    asked: str
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
    """An evaluation of some models on the same records; the first model is the one the others are held against."""

    data: dict[str, Any]
    settings: dict[str, Any]
    models: list[ModelResult]
    notes: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def measures(self) -> list[str]:
        """The measures that some model has, the most telling first, each in the order its models have them."""
        merged: list[str] = []
        for model in self.models:
            place = 0
            for name in model.overall.estimates:
                if name not in merged:
                    merged.insert(place, name)
                place = merged.index(name) + 1
        return merged

    @property
    def headline(self) -> str:
        """The measure that tells most."""
        return self.measures[0] if self.measures else ""

    def as_dict(self) -> dict[str, Any]:
        """The whole as JSON values; numbers that are none are null."""
        models = [{"reference": model.reference, **model_dict(self, model)} for model in self.models]
        return plain({"created": self.created, "data": self.data, "settings": self.settings, "headline": self.headline,
                      "models": models, "notes": self.notes})  # fmt: skip


def summarise(
    runs: Sequence[ModelRun],
    asked: EvaluationRequest,
    material: EvaluationData,
    judged: dict[str, list[JudgedComparison]] | None = None,
) -> Result:
    """The intervals, comparisons and slices of some runs."""
    models = [_model(run, runs[0], material.slices, (judged or {}).get(run.reference, []), asked.seed) for run in runs]
    return Result(material.account, asked.as_settings(), models, material.notes)


def _model(run: ModelRun, first: ModelRun, parts: Slices, judged: list[JudgedComparison], seed: int) -> ModelResult:
    theirs = first.measures if run is not first else {}
    whole = Resamples(len(run.written), seed)
    sliced = {
        column: {value: _on(run.measures, theirs, places, seed) for value, places in values.items()}
        for column, values in parts.items()
    }
    manifest = run.checkpoint.manifest or {}
    return ModelResult(
        asked=run.asked,
        reference=run.reference,
        digest=run.checkpoint.digest,
        stage=manifest.get("stage", ""),
        overall=_numbers(run.measures, theirs, whole),
        slices=sliced,
        judged=judged,
        notes=[*run.notes, *_partial(run)],
    )


def _partial(run: ModelRun) -> list[str]:
    """The measures that could not be taken of every record: too long for the model, without a reference, failed."""
    size = len(run.written)
    less = {name: measure.count for name, measure in run.measures.items() if measure.count < size}
    return [f"{run.reference}: {name} is of {count} of {size} records" for name, count in less.items()]


def _on(ours: Metrics, theirs: Metrics, places: Any, seed: int) -> Numbers:
    """The numbers on some of the records."""
    taken, first = ({name: each.take(places) for name, each in of.items()} for of in (ours, theirs))
    return _numbers({name: each for name, each in taken.items() if each.count}, first, Resamples(len(places), seed))


def _numbers(ours: Metrics, theirs: Metrics, resamples: Resamples) -> Numbers:
    estimates = {name: estimate(measure, resamples) for name, measure in ours.items()}
    shared = {name: measure for name, measure in ours.items() if name in theirs and measure.meets(theirs[name])}
    against = {name: compare(measure, theirs[name], resamples) for name, measure in shared.items()}
    return Numbers(resamples.size, estimates, against)


def model_dict(result: Result, model: ModelResult) -> dict[str, Any]:
    """What a JSON file and an evaluation record keep of one model."""
    first = result.models[0].reference
    return plain(
        {
            "asked": model.asked,
            "digest": model.digest,
            "metrics": {name: asdict(each) for name, each in model.overall.estimates.items()},
            "against": None if model.reference == first else first,
            "comparison": {name: each.as_dict() for name, each in model.overall.against.items()},
            "judged": [each.as_dict() for each in model.judged],
            "slices": {
                column: {value: _slice(numbers) for value, numbers in values.items()}
                for column, values in model.slices.items()
            },
            "notes": model.notes,
        }
    )


def record_of(result: Result, model: ModelResult) -> dict[str, Any]:
    """The evaluation record of one model, as the registry keeps it beside the version."""
    telling = model.overall.estimates.get(result.headline)
    headline = None if telling is None else {"name": result.headline, **asdict(telling)}
    return plain({"headline": headline, "data": result.data, "settings": result.settings, **model_dict(result, model)})


def _slice(numbers: Numbers) -> dict[str, Any]:
    return {
        "n": numbers.count,
        "metrics": {name: asdict(each) for name, each in numbers.estimates.items()},
        "comparison": {name: each.as_dict() for name, each in numbers.against.items()},
    }


def plain(value: Any) -> Any:
    """JSON values: what is no finite number is None."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
