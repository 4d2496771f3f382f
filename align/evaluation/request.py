"""The request of an evaluation, and the records and metrics it comes to, checked before a model is loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.data import load_records
from align.data.catalog import find_dataset
from align.engine.protocol import Sampling
from align.errors import DataError, UsageError, nearest, shorten
from align.evaluation.baselines import baseline_notes
from align.evaluation.languages import detect_language
from align.evaluation.overlap import CORPUS, reference_text
from align.evaluation.sandbox import available_locks
from align.evaluation.scorers import Scorer, scorer_named, scorer_names
from align.models.loading import Precision
from align.rewards.built_in import last_number
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.schema import Record

GREEDY = Sampling(temperature=0.0)
BY_DEVICE = Precision()
_MAX_VALUES = 12
"""of a column that divides a dataset, unless it is asked for"""
_MAX_LABELS = 100
_LABEL_CHOICE = "label_choice"
"""scorer of data whose rows have labels; where all rows share them, they are classified instead"""
_MAX_NUMERIC_CHARACTERS = 24
"""longest answer that is taken for a number with its unit"""

Slices = dict[str, dict[str, np.ndarray]]
"""indices of records by column and value"""


@dataclass(frozen=True)
class EvaluationRequest:
    """Data, metrics and sampling of an evaluation."""

    data: str
    sampling: Sampling = GREEDY
    seed: int = 0
    limit: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    scorers: tuple[str, ...] = ()
    """scorers and corpus metrics by name; empty: those that fit the data"""
    rewards: tuple[RewardSettings, ...] = ()
    reward_model: str | None = None
    """reference of a reward model to score with"""
    labels: tuple[str, ...] = ()
    """classes to choose between by likelihood"""
    classify: bool = False
    """use the answers that occur as labels"""
    baseline: str | None = None
    """labelled rows for classifiers without a model"""
    kl: bool = True
    by: tuple[str, ...] = ()
    allow_code: bool = False
    precision: Precision = BY_DEVICE

    def settings_dict(self) -> dict[str, Any]:
        """Return the settings that an evaluation record keeps."""
        return {
            "seed": self.seed,
            "limit": self.limit,
            "sampling": {key: getattr(self.sampling, key) for key in ("temperature", "top_p", "max_new_tokens")},
            "rewards": [reward.model_dump(mode="json") for reward in self.rewards],
            "reward_model": self.reward_model,
            "scorers": list(self.scorers),
            "labels": list(self.labels),
        }


@dataclass(frozen=True)
class EvaluationData:
    """Records, and the metrics to take of them."""

    records: list[Record]
    slices: Slices
    description: dict[str, Any]
    """name, digest and rows of the data"""
    completion_scorers: tuple[Scorer, ...] = ()
    likelihood_scorers: tuple[Scorer, ...] = ()
    """scorers that compare the likelihoods of options"""
    corpus: tuple[str, ...] = ()
    rewards: WeightedRewards | None = None
    labels: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def needs_completions(self) -> bool:
        """True when completions are needed: there are prompts, and not only likelihoods are compared."""
        reads = bool(self.completion_scorers or self.corpus or self.rewards)
        compares = bool(self.likelihood_scorers or self.labels)
        return (reads or not compares) and any(record.prompt for record in self.records)


def prepare_data(request: EvaluationRequest, roots: Mapping[str, Path] | None = None) -> EvaluationData:
    """Load the records and select the metrics; raises DataError or UsageError for what cannot be measured."""
    record_set = load_records(request.data, on_bad_row=request.on_bad_row, roots=roots)
    records = record_set.records
    if request.limit is not None and request.limit < len(records):
        # Spread over the whole, so that data sorted by language or subject stays mixed.
        records = [records[math.floor(index * len(records) / request.limit)] for index in range(request.limit)]
    dataset = find_dataset(request.data)
    language = dataset.config.language
    languages = (language,) if isinstance(language, str) else tuple(language)
    notes: list[str] = []
    metric_names = list(request.scorers or ([dataset.scorer] if dataset.scorer else []))
    labels = _labels(request, records, metric_names)
    if labels:
        metric_names = [name for name in metric_names if name != _LABEL_CHOICE]
    elif not metric_names:
        metric_names = _default_scorers(records, notes)
    if request.baseline:
        notes += baseline_notes(records, labels, request.baseline, roots, request.seed)
    runnable = []
    for scorer in [_find_scorer(name) for name in metric_names if name not in CORPUS]:
        if scorer.executes_code and not request.allow_code:
            notes.append(f"{scorer.name}: executes model output: not scored without --allow-code-execution")
            continue
        scorer.check(records)
        runnable.append(scorer)
        if scorer.executes_code:
            notes.append(f"{scorer.name}: executed model output, restricted by {', '.join(available_locks())}")
    corpus = tuple(name for name in metric_names if name in CORPUS)
    if corpus and not any(reference_text(record) is not None for record in records if record.prompt):
        raise DataError(
            f"--scorer {corpus[0]}: needs a reference: no record of {request.data} has one; "
            "add an answer or a completion"
        )
    rewards = WeightedRewards(request.rewards, "--rewards") if request.rewards else None
    if rewards:
        rewards.check(records)
    return EvaluationData(
        records,
        slices_of(records, tuple(filter(None, languages)), request.by),
        {**record_set.describe(), "rows": len(records)},
        completion_scorers=tuple(scorer for scorer in runnable if scorer.options is None),
        likelihood_scorers=tuple(scorer for scorer in runnable if scorer.options is not None),
        corpus=corpus,
        rewards=rewards,
        labels=labels,
        notes=[*record_set.notes, *notes],
    )


def _find_scorer(name: str) -> Scorer:
    if name not in scorer_names():
        suggestion = nearest(name, [*CORPUS, *scorer_names()])
        raise UsageError(f"--scorer: asked for {shorten(name)}; no scorer has that name;{suggestion}")
    return scorer_named(name)


def _default_scorers(records: Sequence[Record], notes: list[str]) -> list[str]:
    """Return the scorers that the records have references for, where the dataset names none."""
    answers = [record.answer for record in records if record.answer is not None]
    if len(answers) == len(records):
        numeric = sum(len(answer) <= _MAX_NUMERIC_CHARACTERS and last_number(answer) is not None for answer in answers)
        by_number = ["numeric_match"] if 2 * numeric > len(answers) else []
        return ["exact_match", "normalised_match", "token_f1", *by_number]
    if any(reference_text(record) is not None for record in records if record.prompt):
        installed = [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module)]
        for name in sorted(set(_PACKAGES) - set(installed)):
            notes.append(f'{name} left out: {_PACKAGES[name]} is not installed; pip install "align[eval]"')
        return installed
    return []


_PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}


def _labels(request: EvaluationRequest, records: Sequence[Record], metric_names: Sequence[str]) -> tuple[str, ...]:
    """Return the classes in order, one of them every record's answer; empty when nothing is classified."""
    shared = _shared_labels(records)
    if not (request.labels or request.classify or (shared and _LABEL_CHOICE in metric_names)):
        return ()
    if unanswered := next((record for record in records if record.answer is None), None):
        raise DataError(f"--classify: {unanswered.where} has no answer, which is its class; name its column in a YAML")
    answers = sorted({record.answer or "" for record in records})
    labels = request.labels or shared or tuple(answers)
    if unknown := next((answer for answer in answers if answer not in labels), None):
        raise DataError(f"--labels: the data has the class {unknown!r}; the labels are {', '.join(labels)}; add it")
    if not 2 <= len(labels) <= _MAX_LABELS:
        raise UsageError(f"--classify: {len(labels)} classes found; it takes 2 to {_MAX_LABELS}")
    return labels


def _shared_labels(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the labels that all records share under `meta.labels`, their answers among them."""
    labels = records[0].meta.get("labels")
    if not isinstance(labels, list) or any(record.meta.get("labels") != labels for record in records):
        return ()
    return tuple(labels) if all(record.answer in labels for record in records) else ()


def slices_of(records: Sequence[Record], languages: Sequence[str] = (), by: Sequence[str] = ()) -> Slices:
    """Return slices by language and by each column of `meta` with few values, or by the columns asked for.

    `languages` are those of the dataset's settings. Raises UsageError for a column that no record has.
    """
    keys = sorted({key for record in records for key in record.meta} - {"language"})
    for key in by:
        if key not in ("language", *keys):
            raise UsageError(f"--by {key}: no record has it under meta;{nearest(key, ['language', *keys])}")
    slices: Slices = {}
    for column in sorted(dict.fromkeys(by or ["language", *keys]), key=lambda column: column != "language"):
        if column == "language":
            values = [_language_of(record, languages) for record in records]
        else:
            stated = [record.meta.get(column) for record in records]
            values = [str(one) if isinstance(one, str | int | bool) and len(str(one)) <= 40 else "" for one in stated]
        kinds = sorted({value for value in values if value})
        if 2 <= len(kinds) <= (len(records) if column in by else min(_MAX_VALUES, len(records) - 1)):
            slices[column] = {kind: np.array([i for i, value in enumerate(values) if value == kind]) for kind in kinds}
    return slices


def _language_of(record: Record, languages: Sequence[str]) -> str:
    """Return `meta.language` or `meta.lang`, else the dataset's only language, else the detected one."""
    stated = record.meta.get("language") or record.meta.get("lang")
    if isinstance(stated, str) and stated:
        return stated
    if len(languages) == 1:
        return languages[0]
    turns = [turn["content"] for turn in record.prompt if turn["role"] == "user"]
    return detect_language("\n".join(turns) or record.text or "") or ""
