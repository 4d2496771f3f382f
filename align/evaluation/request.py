"""What an evaluation was asked to do, and the records it does it on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.data import load_records
from align.data.catalog import find_dataset
from align.engine.protocol import Sampling
from align.errors import DataError, UsageError, nearest, shorten
from align.evaluation.overlap import CORPUS, reference_text
from align.evaluation.sandbox import locks_here
from align.evaluation.scorers import Scorer, scorer_named, scorer_names
from align.evaluation.slices import Slices, slices_of
from align.rewards.answer_rewards import last_number
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.schema import Record

if TYPE_CHECKING:
    from align.models.loading import Precision

GREEDY = Sampling(temperature=0.0)
_MOST_LABELS = 100
_CHOICE = "label_choice"
"""the scorer of data whose rows have labels; where all rows have the same ones there is more to tell than accuracy"""
_SHORT = 24
"""characters of an answer that is a number with its unit"""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure, and how; the door fills it from the command line."""

    data: str
    sampling: Sampling = GREEDY
    seed: int = 0
    limit: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    scorers: tuple[str, ...] = ()
    """scorers and corpus metrics by name; none takes what the data has answers for"""
    rewards: tuple[RewardSettings, ...] = ()
    reward_model: str | None = None
    """a reward model whose score is measured, too"""
    labels: tuple[str, ...] = ()
    """classes to choose from by likelihood"""
    classify: bool = False
    """take the answers that occur as labels"""
    kl: bool = True
    by: tuple[str, ...] = ()
    allow_code: bool = False
    precision: Precision | None = None

    def as_settings(self) -> dict[str, Any]:
        """What a record keeps of it."""
        sampling = {key: getattr(self.sampling, key) for key in ("temperature", "top_p", "max_new_tokens")}
        rewards = [reward.model_dump(mode="json") for reward in self.rewards]
        return {
            "seed": self.seed,
            "limit": self.limit,
            "sampling": sampling,
            "rewards": rewards,
            "reward_model": self.reward_model,
            "scorers": list(self.scorers),
            "labels": list(self.labels),
        }


@dataclass(frozen=True)
class EvaluationData:
    """Records and what is measured on them, all of it checked before a model is loaded."""

    records: list[Record]
    slices: Slices
    account: dict[str, Any]
    """name, digest and rows of the data"""
    readers: tuple[Scorer, ...] = ()
    """scorers that read completions"""
    choosers: tuple[Scorer, ...] = ()
    """scorers that compare likelihoods of options"""
    corpus: tuple[str, ...] = ()
    rewards: WeightedRewards | None = None
    labels: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether completions are needed: wherever there is a prompt, unless only likelihoods are compared."""
        reads = bool(self.readers or self.corpus or self.rewards) or not (self.choosers or self.labels)
        return reads and any(record.prompt for record in self.records)


def prepare_data(asked: EvaluationRequest, roots: Mapping[str, Path] | None = None) -> EvaluationData:
    """Read the data and decide what is measured; raises DataError or UsageError for what cannot be."""
    found = load_records(asked.data, on_bad_row=asked.on_bad_row, roots=roots)
    records = _limited(found.records, asked)
    dataset = find_dataset(asked.data)
    language = dataset.config.language
    languages = (language,) if isinstance(language, str) else tuple(language)
    notes: list[str] = []
    names = list(asked.scorers or ([dataset.scorer] if dataset.scorer else []))
    labels = _labels(asked, records, names)
    if labels:
        names = [name for name in names if name != _CHOICE]
    elif not names:
        names = _fitting(records, notes)
    scorers = [_scorer(name) for name in names if name not in CORPUS]
    allowed = [each for each in scorers if asked.allow_code or not each.executes_code]
    for each in scorers:
        if each not in allowed:
            notes.append(f"{each.name}: runs what the model wrote; completions only, without --allow-code-execution")
    for each in allowed:
        each.check(records)
        if each.executes_code:
            notes.append(f"{each.name}: ran what the model wrote, locked up by {', '.join(locks_here())}")
    corpus = tuple(name for name in names if name in CORPUS)
    if corpus and not any(reference_text(record) is not None for record in records if record.prompt):
        raise DataError(
            f"--scorer {corpus[0]}: needs a reference; no record of {asked.data} has one; add an answer or a completion"
        )
    rewards = WeightedRewards(asked.rewards, "--rewards") if asked.rewards else None
    if rewards:
        rewards.check(records)
    return EvaluationData(
        records,
        slices_of(records, tuple(filter(None, languages)), asked.by),
        {**found.describe(), "rows": len(records)},
        readers=tuple(each for each in allowed if each.options is None),
        choosers=tuple(each for each in allowed if each.options is not None),
        corpus=corpus,
        rewards=rewards,
        labels=labels,
        notes=[*found.notes, *notes],
    )


def _limited(records: list[Record], asked: EvaluationRequest) -> list[Record]:
    """The first records, spread over the whole so that a set in order of language or subject stays mixed."""
    if asked.limit is None or asked.limit >= len(records):
        return records
    return [records[math.floor(place * len(records) / asked.limit)] for place in range(asked.limit)]


def _scorer(name: str) -> Scorer:
    if name not in scorer_names():
        known = nearest(name, [*CORPUS, *scorer_names()])
        raise UsageError(f"--scorer: asked for {shorten(name)}; no scorer has that name;{known}")
    return scorer_named(name)


def _fitting(records: Sequence[Record], notes: list[str]) -> list[str]:
    """The scorers that data without a scorer of its own has references for."""
    answers = [record.answer for record in records if record.answer is not None]
    if len(answers) == len(records):
        numeric = sum(len(answer) <= _SHORT and last_number(answer) is not None for answer in answers)
        return [
            "exact_match",
            "normalised_match",
            "token_f1",
            *(["numeric_match"] if 2 * numeric > len(answers) else []),
        ]
    if any(reference_text(record) is not None for record in records if record.prompt):
        have = [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module)]
        for name in sorted(set(_PACKAGES) - set(have)):
            notes.append(f'{name} left out: {_PACKAGES[name]} is not installed; pip install "align[eval]"')
        return have
    return []


_PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}


def _labels(asked: EvaluationRequest, records: Sequence[Record], names: Sequence[str]) -> tuple[str, ...]:
    """The classes, in order; every record's answer must be one of them. None when nothing is to be classified."""
    shared = _shared_labels(records)
    if not (asked.labels or asked.classify or (shared and _CHOICE in names)):
        return ()
    if lacking := next((record for record in records if record.answer is None), None):
        raise DataError(f"--classify: {lacking.where} has no answer, which is its class; name its column in a YAML")
    found = sorted({record.answer or "" for record in records})
    labels = asked.labels or shared or tuple(found)
    if strange := next((answer for answer in found if answer not in labels), None):
        raise DataError(f"--labels: the data has the class {strange!r}; the labels are {', '.join(labels)}; add it")
    if not 2 <= len(labels) <= _MOST_LABELS:
        raise UsageError(f"--classify: {len(labels)} classes found; it takes 2 to {_MOST_LABELS}")
    return labels


def _shared_labels(records: Sequence[Record]) -> tuple[str, ...]:
    """The labels that all records have in common under `meta.labels`, their answers among them."""
    labels = records[0].meta.get("labels")
    if not isinstance(labels, list) or any(record.meta.get("labels") != labels for record in records):
        return ()
    return tuple(labels) if all(record.answer in labels for record in records) else ()
