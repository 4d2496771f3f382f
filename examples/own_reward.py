"""A reward of your own, for PPO and GRPO; any settings may then name it.

python examples/own_reward.py ppo examples/ppo-gsm8k.yaml "rewards=[{name: numeric_match}, {name: short_steps}]"
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

from pydantic import Field

from align.rewards import reward
from align.schema import Record
from align.training.command import main


@reward
def short_steps(record: Record, completion: str, words: Annotated[int, Field(gt=0)] = 20) -> float:
    """The share of the lines that have at most so many words.

    `record` is the row the prompt comes from: `record.prompt`, `record.answer`, `record.meta` and so on.
    """
    lines = [line for line in completion.splitlines() if line.strip()]
    return sum(len(line.split()) <= words for line in lines) / max(1, len(lines))


if __name__ == "__main__":
    stage, *words = sys.argv[1:]
    sys.exit(main(importlib.import_module(f"align.{stage}").STAGE, words))
