"""An evaluation from beginning to end, for the command line and for programs.

evaluation = evaluate(registry, ["my-sft", "my-dpo"], EvaluationRequest(data="my-prompts"))
save_evaluation(registry, evaluation, Outputs(report="report.html"))
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import MachineError, UsageError
from align.evaluation.completions import texts_of
from align.evaluation.metric import Judge, JudgedComparison, compare_verdicts, mean_metric, verdicts_from_scores
from align.evaluation.model_runs import ModelRun, evaluate_models, resolve_models
from align.evaluation.report_page import render_report
from align.evaluation.request import EvaluationData, EvaluationRequest, prepare_data
from align.evaluation.results import Result, evaluation_record, sample_rows, summarise_runs
from align.models.heads import check_score_head
from align.registry import Registry, evaluations
from align.rewards import RewardContext
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards


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
    checkpoints = resolve_models(registry, references)
    if request.reward_model:
        check_score_head(registry.resolve(request.reward_model))
        judges = {request.reward_model: "reward_model", **(judges or {})}
    runs = evaluate_models(registry, checkpoints, request, data)
    _add_rewards(registry, runs, request, data)
    judged = {run.reference: _judge(run, runs[0], data, judges or {}, request.seed) for run in runs[1:]}
    return Evaluation(summarise_runs(runs, request, data, judged), runs, data)


def _add_rewards(
    registry: Registry, runs: Sequence[ModelRun], request: EvaluationRequest, data: EvaluationData
) -> None:
    """Add to each run the reward functions' values (`reward` is their sum) and the reward model's score.

    The models that wrote the completions are no longer in memory.
    """
    sums = {} if data.rewards is None else {"reward": data.rewards}
    if request.reward_model:
        learned = RewardSettings(name="learned", args={"model": request.reward_model})
        sums["reward_model"] = WeightedRewards([learned], "--reward_model")
    for name, rewards in sums.items():
        rewards.load(RewardContext(registry, request.precision, lambda line: None))
        for run in runs:
            texts = {index: one.text_with_reasoning for index, one in enumerate(run.completions) if one is not None}
            scored = rewards.score_all([data.records[index] for index in texts], [*texts.values()])
            columns = {name: [rewards.total(values) for values in scored]}
            if len(rewards.names) > 1:
                columns |= {part: [values[part] for values in scored] for part in rewards.names}
            for column, values in columns.items():
                rows = np.full(len(data.records), np.nan)
                rows[[*texts]] = values
                run.add([mean_metric(column, rows)])


def _judge(
    run: ModelRun, first: ModelRun, data: EvaluationData, judges: Mapping[str, Judge | str], seed: int
) -> list[JudgedComparison]:
    compared = []
    for name, judge in judges.items():
        if isinstance(judge, str):
            verdicts = verdicts_from_scores(run.metrics[judge].rows, first.metrics[judge].rows)
        else:
            verdicts = judge(data.records, texts_of(run.completions), texts_of(first.completions))
        compared.append(compare_verdicts(name, first.reference, verdicts, seed, data.slices))
    return compared


def save_evaluation(
    registry: Registry, evaluation: Evaluation, outputs: Outputs, also: Sequence[Evaluation] = ()
) -> list[str]:
    """Write the files and the registry's records; returns the references of the versions with a new record.

    `also` are evaluations of the same models on other data: the report has a section for each.
    """
    recorded = []
    for model, run in zip(evaluation.result.models, evaluation.runs, strict=True) if outputs.record else ():
        if evaluations.is_version_of(registry, run.checkpoint):
            evaluations.add_record(registry, run.checkpoint, evaluation_record(evaluation.result, model))
            recorded.append(model.reference)
    if outputs.json:
        write_json(outputs.json, evaluation.result.as_dict())
    if outputs.samples:
        rows = sample_rows(evaluation.runs, evaluation.data)
        _write_text(outputs.samples, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if outputs.report:
        lineages = [registry.lineage(run.checkpoint) for run in evaluation.runs]
        _write_text(outputs.report, [render_report(evaluation, lineages, also)])
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
    for comparison in (comparison for model in result.models for comparison in model.judged):
        # Equal completions are ties without asking.
        if comparison.win_rate is None or (comparison.consistency is None and comparison.has_failures):
            reasons = ", ".join(f"{count} {reason}" for reason, count in comparison.failed.items())
            raise MachineError(
                f"judge {comparison.judge}: gave no verdict ({reasons}); start it or use another, then rerun"
            )
