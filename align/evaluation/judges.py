"""Judges: functions from a record and a completion to named scores, of which `gold` counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from align.schema import Record
from align.world import judge

Judge = Callable[[Record, str], dict[str, float]]
"""`gold` in [0, 1] and whatever else is worth a column"""


def judge_world(record: Record, completion: str) -> dict[str, float]:
    """The verdict of the small world's judge, as numbers."""
    verdict = judge(record.prompt, completion)
    return {"gold": verdict.gold} | {name: float(value) for name, value in asdict(verdict).items()}
