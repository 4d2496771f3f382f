"""What a reward model makes of held-out pairs: every pair scored once, and told in a few numbers and two pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from align.evaluation.reward_panels import panels_of
from align.evaluation.reward_ranking import Pairs, describe_pairs
from align.models.scorer import score_sequences
from align.statistics import Proportion

if TYPE_CHECKING:
    from datasets import Dataset

    from align.models.adapters import LoadedBase

_WINDOW = 1000
"""pairs in memory at once"""
_MARKED = 0.5
"""a correlation with length from which it is said, where it is also twice what so few answers have by chance"""


@dataclass(frozen=True)
class Report:
    """Numbers, pictures and remarks about held-out pairs."""

    numbers: dict[str, float]
    panels: tuple[Callable[[Any], None], ...]
    remarks: list[str]


def report_pairs(loaded: LoadedBase, rows: Dataset | None, size: int) -> Report:
    """Score joined pairs, `size` answers a pass, and describe what came out; an empty report without pairs."""
    if rows is None:
        return Report({}, (), [])
    pairs = score_pairs(loaded, rows, size)
    numbers = describe_pairs(pairs)
    return Report(numbers, panels_of(pairs), remarks(numbers))


def score_pairs(loaded: LoadedBase, rows: Dataset, size: int) -> Pairs:
    """The scores and answer lengths of rows of `chosen_ids`, `rejected_ids` and `prompt_length`."""
    scores: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    lengths: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    for start in range(0, len(rows), _WINDOW):
        window = rows[start : start + _WINDOW]
        prompts = np.array(window["prompt_length"])
        both = score_sequences(loaded, window["chosen_ids"] + window["rejected_ids"], size)
        for side, part in zip(scores, np.split(both, 2), strict=True):
            scores[side].append(part)
            lengths[side].append(np.array([len(ids) for ids in window[f"{side}_ids"]]) - prompts)
    joined = {side: np.concatenate(parts) for side, parts in scores.items()}
    sizes = {side: np.concatenate(parts) for side, parts in lengths.items()}
    return Pairs(joined["chosen"], joined["rejected"], sizes["chosen"], sizes["rejected"])


def remarks(numbers: dict[str, float]) -> list[str]:
    """What a reader should know at once: the accuracy with its interval, and whether it is chance or length."""
    share = Proportion(*(numbers[f"held_out_accuracy{end}"] for end in ("", "_low", "_high")))
    chance = "; that is no better than a coin" if share.low <= 0.5 <= share.high else ""
    found = [f"held out: {numbers['held_out_pairs']:.0f} pairs, accuracy {share}{chance}"]
    leaning = numbers.get("length_correlation", 0.0)
    by_chance = (2 * numbers["held_out_pairs"]) ** -0.5
    if abs(leaning) >= max(_MARKED, 2 * by_chance):
        found.append(
            f"held out: scores follow the length of answers (correlation {leaning:.2f}; preferring the longer answer "
            f"alone is right in {numbers['accuracy_of_longer']:.0%}); look at accuracy_chosen_shorter"
        )
    return found
