"""The judges of the small world and of the support desk as scorers."""

from __future__ import annotations

from dataclasses import asdict

from align.evaluation.scorers import scorer
from align.schema import Record
from align.world.desk_judge import ExpectedAnswer, judge_answer
from align.world.judge import judge


@scorer
def world(record: Record, completion: str) -> dict[str, float]:
    """Return the verdict on an answer to a question of the small world: `gold` in [0, 1], and what it is made of."""
    verdict = judge(record.prompt, completion)
    return {"gold": verdict.gold} | {name: float(value) for name, value in asdict(verdict).items()}


@scorer(needs=("meta.kind", "meta.truth"))
def desk(record: Record, completion: str) -> dict[str, float]:
    """Return the verdict on an answer of the support desk: `gold` in [0, 1], and what it is made of.

    `right_fact` is of the rows whose page has the answer, `honest` of those whose page has not.
    """
    expected = ExpectedAnswer.read(record.meta)
    verdict = judge_answer(record.prompt, expected, completion)
    right = {"unknown": "honest", "chat": "no_fact_in_chat"}.get(expected.kind, "right_fact")
    parts = {right: verdict.right, "courteous": verdict.courteous, "short": verdict.short}
    return {"gold": verdict.gold} | {name: float(value) for name, value in parts.items()}
