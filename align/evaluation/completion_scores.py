"""What reward functions, a reward model and judges make of completions, once the models that wrote them are gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from align.evaluation.completions import texts_of, whole_texts_of
from align.evaluation.judging import JudgedComparison, judged, verdicts_from_scores
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
"""by the reference of the model that was judged"""


def add_scores(
    registry: Registry, runs: Sequence[ModelRun], asked: EvaluationRequest, material: EvaluationData
) -> None:
    """Give each run the values of the reward functions (`reward` is their sum) and the reward model's score."""
    for name, rewards in _sums(asked, material):
        _open(rewards, registry, asked)
        for run in runs:
            run.add(_values(name, rewards, material.records, whole_texts_of(run.written)))


def _sums(asked: EvaluationRequest, material: EvaluationData) -> list[tuple[str, WeightedRewards]]:
    sums = [] if material.rewards is None else [("reward", material.rewards)]
    if asked.reward_model:
        learned = RewardSettings(name="learned", args={"model": asked.reward_model})
        sums.append(("reward_model", WeightedRewards([learned], "--reward_model")))
    return sums


def _open(rewards: WeightedRewards, registry: Registry, asked: EvaluationRequest) -> None:
    from align.models.loading import Precision
    from align.rewards import RewardContext

    rewards.load(RewardContext(registry, asked.precision or Precision(), lambda line: None))


def _values(name: str, rewards: WeightedRewards, records: Sequence[Record], texts: Texts) -> list[Metric]:
    known = [place for place, text in enumerate(texts) if text is not None]
    found = rewards.score_all([records[place] for place in known], [texts[place] or "" for place in known])

    def column(values: list[float]) -> np.ndarray:
        rows = np.full(len(records), np.nan)
        rows[known] = values
        return rows

    parts = rewards.names if len(rewards.names) > 1 else []
    return [
        mean_metric(name, column([rewards.total(values) for values in found])),
        *(mean_metric(part, column([values[part] for values in found])) for part in parts),
    ]


def judge_all(
    runs: Sequence[ModelRun], material: EvaluationData, judges: dict[str, Judge | str], seed: int = 0
) -> Judgements:
    """Every judge's verdicts on each model against the first; a judge given as text is a measure whose rows decide."""
    first = runs[0]
    found: Judgements = {}
    for run in runs[1:]:
        found[run.reference] = [
            judged(name, first.reference, _verdicts(judge, run, first, material.records), seed, material.slices)
            for name, judge in judges.items()
        ]
    return found


def _verdicts(judge: Judge | str, run: ModelRun, first: ModelRun, records: Sequence[Record]) -> Verdicts:
    if isinstance(judge, str):
        return verdicts_from_scores(run.measures[judge].rows, first.measures[judge].rows)
    return judge(records, texts_of(run.written), texts_of(first.written))
