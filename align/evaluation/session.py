"""An evaluation from beginning to end, for the command line and for programs: measure, summarise, keep.

found = evaluate(registry, ["my-sft", "my-dpo"], EvaluationRequest(data="my-prompts"))
keep(registry, found, Outputs(report="report.html"))
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
from align.evaluation.model_runs import ModelRun, measure_models, resolve
from align.evaluation.request import EvaluationData, EvaluationRequest, prepare_data
from align.evaluation.results import Result, record_of, summarise
from align.registry import evaluations

if TYPE_CHECKING:
    from align.evaluation.judging import Judge
    from align.registry import Registry


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and the single records it was measured on."""

    result: Result
    runs: list[ModelRun]
    material: EvaluationData


@dataclass(frozen=True)
class Outputs:
    """The files an evaluation is written to, and whether the registry keeps its numbers."""

    json: str | None = None
    samples: str | None = None
    report: str | None = None
    record: bool = True

    def check(self) -> None:
        """Raise UsageError before the work for a file that could not be written after it."""
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
    asked: EvaluationRequest,
    judges: Mapping[str, Judge | str] | None = None,
) -> Evaluation:
    """Measure some models on the same records; the first is the one the others are held against.

    `judges` are asked whose completion is better, the model's or the first one's; one given as text is the measure that
    decides. A reward model that scores also judges. What can be refused is refused before a model is loaded.
    """
    material = prepare_data(asked, {"registry": registry.root})
    resolve(registry, references)
    _check_reward_model(registry, asked)
    runs = measure_models(registry, references, asked, material)
    add_scores(registry, runs, asked, material)
    judging = {**({asked.reward_model: "reward_model"} if asked.reward_model else {}), **(judges or {})}
    return Evaluation(summarise(runs, asked, material, judge_all(runs, material, judging, asked.seed)), runs, material)


def keep(registry: Registry, found: Evaluation, outputs: Outputs) -> list[str]:
    """Write the files and the registry's records; gives the references of the versions that have one now."""
    kept = []
    for model, run in zip(found.result.models, found.runs, strict=True) if outputs.record else ():
        if evaluations.is_version_of(registry, run.checkpoint):
            evaluations.add_record(registry, run.checkpoint, record_of(found.result, model))
            kept.append(model.reference)
    if outputs.json:
        write_json(outputs.json, found.result.as_dict())
    if outputs.samples:
        _write(outputs.samples, _samples(found))
    if outputs.report:
        _write(outputs.report, [_report(registry, found)])
    return kept


def write_json(path: str, value: dict[str, Any]) -> None:
    """All numbers as a file."""
    _write(path, [json.dumps(value, indent=1, ensure_ascii=False), "\n"])


def _write(path: str, pieces: Iterable[str]) -> None:
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(pieces)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror}); free space or give another file") from None


def refuse_silence(result: Result) -> None:
    """Raise MachineError when some judge failed on every pair of some model that it was asked about."""
    for model in result.models:
        for each in model.judged:
            if each.silent:
                reasons = ", ".join(f"{count} {reason}" for reason, count in each.failed.items())
                raise MachineError(
                    f"judge {each.judge}: gave no verdict ({reasons}); start it or take another, and evaluate again"
                )


def _check_reward_model(registry: Registry, asked: EvaluationRequest) -> None:
    from align.models.heads import check_score_head

    if asked.reward_model:
        check_score_head(registry.resolve(asked.reward_model))


def _samples(found: Evaluation) -> Iterator[str]:
    from align.evaluation.samples import sample_rows

    for row in sample_rows(found.runs, found.material):
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _report(registry: Registry, found: Evaluation) -> str:
    from align.evaluation.report_page import ReportInputs, draw_page

    lineages = [registry.lineage(run.checkpoint) for run in found.runs]
    return draw_page(ReportInputs(found.result, found.runs, found.material, lineages))
