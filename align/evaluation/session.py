"""An evaluation from beginning to end, for the command line and for programs.

evaluation = evaluate(registry, ["my-sft", "my-dpo"], EvaluationRequest(data="my-prompts"))
save_evaluation(registry, evaluation, Outputs(report="report.html"))
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import MachineError, UsageError
from align.evaluation.completion_scores import add_scores, judge_all
from align.evaluation.model_runs import ModelRun, evaluate_models, resolve_models
from align.evaluation.request import EvaluationData, EvaluationRequest, prepare_data
from align.evaluation.results import Result, evaluation_record, sample_rows, summarise_runs
from align.registry import evaluations

if TYPE_CHECKING:
    from align.evaluation.judging import Judge
    from align.registry import Registry


@dataclass(frozen=True)
class Evaluation:
    """The result, with the runs and records it comes from."""

    result: Result
    runs: list[ModelRun]
    data: EvaluationData


@dataclass(frozen=True)
class Outputs:
    """The files an evaluation is written to, and whether the registry records its numbers."""

    json: str | None = None
    samples: str | None = None
    report: str | None = None
    record: bool = True

    def check(self) -> None:
        """Raise UsageError for a file that could not be written, before the evaluation starts."""
        for path in filter(None, (self.json, self.samples, self.report)):
            folder = Path(path).parent
            if Path(path).is_dir():
                raise UsageError(f"{path}: is a folder; give a file")
            if not folder.is_dir():
                raise UsageError(f"{path}: no folder {folder}; create it, or give another file")
            if not os.access(path if Path(path).exists() else folder, os.W_OK):
                raise UsageError(f"{path}: may not be written by you; give another file")


def evaluate(
    registry: Registry,
    references: Sequence[str],
    request: EvaluationRequest,
    judges: Mapping[str, Judge | str] | None = None,
) -> Evaluation:
    """Evaluate models on the same records; the first is the baseline of the comparisons.

    `judges` decide whose completion is better, the model's or the baseline's; a judge given as text is the metric that
    decides. A reward model that scores also judges. Everything is checked before a model is loaded.
    """
    data = prepare_data(request, {"registry": registry.root})
    resolve_models(registry, references)
    _check_reward_model(registry, request)
    runs = evaluate_models(registry, references, request, data)
    add_scores(registry, runs, request, data)
    all_judges = {**({request.reward_model: "reward_model"} if request.reward_model else {}), **(judges or {})}
    return Evaluation(summarise_runs(runs, request, data, judge_all(runs, data, all_judges, request.seed)), runs, data)


def save_evaluation(registry: Registry, evaluation: Evaluation, outputs: Outputs) -> list[str]:
    """Write the files and the registry's records; returns the references of the versions with a new record."""
    recorded = []
    for model, run in zip(evaluation.result.models, evaluation.runs, strict=True) if outputs.record else ():
        if evaluations.is_version_of(registry, run.checkpoint):
            evaluations.add_record(registry, run.checkpoint, evaluation_record(evaluation.result, model))
            recorded.append(model.reference)
    if outputs.json:
        write_json(outputs.json, evaluation.result.as_dict())
    if outputs.samples:
        _write_text(outputs.samples, _samples(evaluation))
    if outputs.report:
        _write_text(outputs.report, [_report(registry, evaluation)])
    return recorded


def write_json(path: str, value: dict[str, Any]) -> None:
    """Write all numbers as a JSON file."""
    _write_text(path, [json.dumps(value, indent=1, ensure_ascii=False), "\n"])


def _write_text(path: str, pieces: Iterable[str]) -> None:
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(pieces)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror}); free space or give another file") from None


def require_verdicts(result: Result) -> None:
    """Raise MachineError when a judge failed on every pair of some model."""
    for model in result.models:
        for comparison in model.judged:
            if comparison.has_no_verdict:
                reasons = ", ".join(f"{count} {reason}" for reason, count in comparison.failed.items())
                raise MachineError(
                    f"judge {comparison.judge}: gave no verdict ({reasons}); start it or use another, then rerun"
                )


def _check_reward_model(registry: Registry, request: EvaluationRequest) -> None:
    from align.models.heads import check_score_head

    if request.reward_model:
        check_score_head(registry.resolve(request.reward_model))


def _samples(evaluation: Evaluation) -> Iterator[str]:
    for row in sample_rows(evaluation.runs, evaluation.data):
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _report(registry: Registry, evaluation: Evaluation) -> str:
    from align.evaluation.report_page import ReportInputs, render_report

    lineages = [registry.lineage(run.checkpoint) for run in evaluation.runs]
    return render_report(ReportInputs(evaluation.result, evaluation.runs, evaluation.data, lineages))
