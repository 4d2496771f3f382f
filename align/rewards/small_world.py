"""The small world's judge as a reward: whether an answer is right, polite, short and in the language asked."""

from __future__ import annotations

from align.rewards import reward
from align.schema import Record
from align.world import judge


@reward(answer_only=True)
def small_world(record: Record, completion: str) -> float:
    """The gold score in [0, 1] of an answer to a question about the small world (`align.world`)."""
    return judge(record.prompt, completion).gold
