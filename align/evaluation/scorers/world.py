"""The small world's own judge as a scorer."""

from __future__ import annotations

from dataclasses import asdict

from align.evaluation.scorers import scorer
from align.schema import Record
from align.world.judge import judge


@scorer
def world(record: Record, completion: str) -> dict[str, float]:
    """Return the verdict on an answer to a question of the small world: `gold` in [0, 1], and what it is made of."""
    verdict = judge(record.prompt, completion)
    return {"gold": verdict.gold} | {name: float(value) for name, value in asdict(verdict).items()}
