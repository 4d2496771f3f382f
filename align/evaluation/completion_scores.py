"""Scores of completions by reward functions, a reward model and judges, after their models are unloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from align.evaluation.completions import texts_of, texts_with_reasoning
from align.evaluation.judging import JudgedComparison, compare_verdicts, verdicts_from_scores
from align.evaluation.metric import Metric, mean_metric
from align.evaluation.model_runs import ModelRun
from align.evaluation.overlap import Texts
from align.evaluation.request import EvaluationData, EvaluationRequest
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.schema import Record

if TYPE_CHECKING:
    from align.evaluation.judging import Judge, Verdicts
    from align.registry import Registry

Judgements = dict[str, list[JudgedComparison]]
"""by reference of the judged model"""


def add_scores(registry: Registry, runs: Sequence[ModelRun], request: EvaluationRequest, data: EvaluationData) -> None:
    """Add to each run the reward functions' values (`reward` is their sum) and the reward model's score."""
    from align.models.loading import Precision
    from align.rewards import RewardContext

    context = RewardContext(registry, request.precision or Precision(), lambda line: None)
    for name, rewards in _reward_sums(request, data):
        rewards.load(context)
        for run in runs:
            run.add(_reward_metrics(name, rewards, data.records, texts_with_reasoning(run.completions)))


def _reward_sums(request: EvaluationRequest, data: EvaluationData) -> list[tuple[str, WeightedRewards]]:
    sums = [] if data.rewards is None else [("reward", data.rewards)]
    if request.reward_model:
        learned = RewardSettings(name="learned", args={"model": request.reward_model})
        sums.append(("reward_model", WeightedRewards([learned], "--reward_model")))
    return sums


def _reward_metrics(name: str, rewards: WeightedRewards, records: Sequence[Record], texts: Texts) -> list[Metric]:
    indices = [index for index, text in enumerate(texts) if text is not None]
    scored = rewards.score_all([records[index] for index in indices], [texts[index] or "" for index in indices])

    def column(values: list[float]) -> np.ndarray:
        rows = np.full(len(records), np.nan)
        rows[indices] = values
        return rows

    part_names = rewards.names if len(rewards.names) > 1 else []
    return [
        mean_metric(name, column([rewards.total(values) for values in scored])),
        *(mean_metric(part, column([values[part] for values in scored])) for part in part_names),
    ]


def judge_all(
    runs: Sequence[ModelRun], data: EvaluationData, judges: dict[str, Judge | str], seed: int = 0
) -> Judgements:
    """Return every judge's comparison of each model with the first; a judge given as text is a metric."""
    first = runs[0]
    scored: Judgements = {}
    for run in runs[1:]:
        scored[run.reference] = [
            compare_verdicts(name, first.reference, _verdicts(judge, run, first, data.records), seed, data.slices)
            for name, judge in judges.items()
        ]
    return scored


def _verdicts(judge: Judge | str, run: ModelRun, first: ModelRun, records: Sequence[Record]) -> Verdicts:
    if isinstance(judge, str):
        return verdicts_from_scores(run.metrics[judge].rows, first.metrics[judge].rows)
    return judge(records, texts_of(run.completions), texts_of(first.completions))
