"""A reward of your own, for PPO and GRPO; the settings name this file beside it.

align ppo examples/ppo-gsm8k.yaml \
    "rewards=[{name: numeric_match}, {name: short_steps, file: examples/own_reward.py, weight: 0.2, args: {words: 15}}]"
"""

from typing import Annotated

from pydantic import Field

from align.rewards import reward
from align.schema import Record


@reward
def short_steps(record: Record, completion: str, words: Annotated[int, Field(gt=0)] = 20) -> float:
    """Return the share of the lines that have at most `words` words.

    `record` is the row the prompt comes from: `record.prompt`, `record.answer`, `record.meta` and so on.
    """
    lines = [line for line in completion.splitlines() if line.strip()]
    return sum(len(line.split()) <= words for line in lines) / max(1, len(lines))
