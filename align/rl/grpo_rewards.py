"""Our rewards as the functions that TRL's GRPOTrainer calls with a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.data.reasoning import mark_reasoning
from align.rewards.weighted_rewards import WeightedRewards
from align.rl.rollout_log import append_sample, drop_samples_after
from align.schema import Record


class GrpoRewards:
    """One function for each of some rewards; a completion is scored with the record its prompt comes from.

    The first completion of every rollout is appended to samples.jsonl in `folder`, unless that is None.
    """

    def __init__(self, rewards: WeightedRewards, records: Sequence[Record], folder: Path | None, tokenizer: Any):
        self._rewards, self._records, self._folder, self._tokenizer = rewards, records, folder, tokenizer
        self._sample: dict[str, float] = {}
        self._has_dropped_samples = False

    def functions(self) -> list[Callable[..., list[float]]]:
        """Return the functions, in order and named as their rewards; each gives unweighted values."""
        return [self._function(name) for name in self._rewards.names]

    def _function(self, name: str) -> Callable[..., list[float]]:
        def score(
            prompts: list[list[int]], completion_ids: list[list[int]], record: list[int], trainer_state: Any, **_: Any
        ) -> list[float]:
            # TRL's own texts lack marks of reasoning that are special tokens, and those that the prompt opened.
            pairs = zip(prompts, completion_ids, strict=True)
            completions = [mark_reasoning(self._tokenizer, prompt, ids) for prompt, ids in pairs]
            values = self._rewards.score_one(name, [self._records[index] for index in record], completions)
            self._sample[name] = values[0]
            if self._folder is not None and len(self._sample) == len(self._rewards.names):
                self._append_sample(self._folder, trainer_state.global_step, self._records[record[0]], completions[0])
            return values

        score.__name__ = name
        return score

    def _append_sample(self, folder: Path, steps_done: int, record: Record, completion: str) -> None:
        if not self._has_dropped_samples:
            drop_samples_after(folder, steps_done)
            self._has_dropped_samples = True
        score = self._rewards.total(self._sample)
        sample = {"completion": completion, "score": score, "rewards": self._sample}
        append_sample(folder, steps_done + 1, record, sample)
        self._sample = {}
