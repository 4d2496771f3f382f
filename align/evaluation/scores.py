"""Scores of several models over one base: sample completions of the same prompts, judge them, measure the distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.evaluation.metrics import Interval, mean_interval
from align.schema import Record, assistant

if TYPE_CHECKING:
    from align.evaluation.judges import Judge
    from align.models.adapters import Resident

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Contender:
    """A model to score: its reference in the resident, and what the table calls it."""

    label: str
    reference: str


@dataclass(frozen=True)
class ModelScore:
    """What was measured of one model."""

    label: str
    reference: str
    gold: Interval
    parts: dict[str, float]
    """means of the judge's other numbers"""
    length: Interval
    """tokens of a completion, its end token included"""
    kl: Interval | None
    """nats a completion from the reference model, on the model's own completions"""
    samples: list[str]
    """the first completions"""


def score_models(
    resident: Resident,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    judge: Judge,
    kl_from: str | None = None,
    seed: int = 0,
) -> list[ModelScore]:
    """Score each model on one completion a prompt, sampled at temperature 1; row i has the same seed in every model.

    `kl_from` is the reference of the model that distances are measured from.
    """
    completions = _complete(resident, contenders, records, seed)
    return [_score(resident, each, records, completions[each.reference], judge, kl_from) for each in contenders]


def _complete(
    resident: Resident, contenders: Sequence[Contender], records: Sequence[Record], seed: int
) -> dict[str, list[str]]:
    from align.engine.local import LocalEngine
    from align.engine.protocol import Row, Sampling

    rows = [
        Row(each.reference, record.prompt, seed * len(records) + place)
        for each in contenders
        for place, record in enumerate(records)
    ]
    engine = LocalEngine(resident)
    try:
        texts = engine.complete(rows, Sampling(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS))
    finally:
        engine.close()
    size = len(records)
    return {each.reference: texts[place * size :][:size] for place, each in enumerate(contenders)}


def _score(
    resident: Resident,
    contender: Contender,
    records: Sequence[Record],
    completions: list[str],
    judge: Judge,
    kl_from: str | None,
) -> ModelScore:
    verdicts = [judge(record, text) for record, text in zip(records, completions, strict=True)]
    rows = _render(resident, records, completions)
    means = {key: sum(verdict[key] for verdict in verdicts) / len(verdicts) for key in verdicts[0] if key != "gold"}
    return ModelScore(
        label=contender.label,
        reference=contender.reference,
        gold=mean_interval([verdict["gold"] for verdict in verdicts]),
        parts=means,
        length=mean_interval([sum(row["completion_mask"]) for row in rows]),
        kl=_distance(resident, contender, rows, kl_from),
        samples=completions[:8],
    )


def _render(resident: Resident, records: Sequence[Record], completions: list[str]) -> list[dict[str, Any]]:
    from align.data.render import render_demonstrations

    pairs = zip(records, completions, strict=True)
    spoken = [Record(prompt=record.prompt, completion=[assistant(text)]) for record, text in pairs]
    return render_demonstrations(spoken, resident.tokenizer, resident.model.config.max_position_embeddings).rows


def _distance(
    resident: Resident, contender: Contender, rows: list[dict[str, Any]], kl_from: str | None
) -> Interval | None:
    from align.evaluation.divergence import completion_kl

    if kl_from is None or contender.reference == kl_from:
        return None
    names = resident.adapters
    return mean_interval(completion_kl(resident, names[contender.reference], names[kl_from], rows))
