"""Our rewards as the functions that TRL's GRPOTrainer calls with a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.data.reasoning import mark_reasoning
from align.rewards.weighted_rewards import WeightedRewards
from align.rl.rollout_log import append_sample, drop_samples_after
from align.schema import Record

RewardFunction = Callable[..., list[float]]


def reward_functions(
    rewards: WeightedRewards, records: Sequence[Record], folder: Path | None, tokenizer: Any
) -> list[RewardFunction]:
    """Return one function for each reward, in order and of its name, that gives unweighted values.

    A completion is scored with the record its prompt comes from. The first completion of every rollout is appended to
    samples.jsonl in `folder`, unless that is None.
    """
    sample: dict[str, float] = {}
    has_dropped_samples = False

    def function(name: str) -> RewardFunction:
        def score(
            prompts: list[list[int]], completion_ids: list[list[int]], record: list[int], trainer_state: Any, **_: Any
        ) -> list[float]:
            nonlocal has_dropped_samples
            # TRL's own texts lack marks of reasoning that are special tokens, and those that the prompt opened.
            pairs = zip(prompts, completion_ids, strict=True)
            completions = [mark_reasoning(tokenizer, prompt, ids) for prompt, ids in pairs]
            values = rewards.score_one(name, [records[index] for index in record], completions)
            sample[name] = values[0]
            if folder is not None and len(sample) == len(rewards.names):
                if not has_dropped_samples:
                    drop_samples_after(folder, trainer_state.global_step)
                    has_dropped_samples = True
                facts = {"completion": completions[0], "score": rewards.total(sample), "rewards": sample}
                append_sample(folder, trainer_state.global_step + 1, records[record[0]], facts)
                sample.clear()
            return values

        score.__name__ = name
        return score

    return [function(name) for name in rewards.names]
