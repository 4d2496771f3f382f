"""What is said about held-out pairs: the accuracy always, length only where there are enough answers to say so."""

from __future__ import annotations

import numpy as np
import pytest

from align.evaluation.reward_report import ScoredPairs, describe_pairs, held_out_messages


def told(count: int) -> str:
    """The messages about pairs of which every score is the length of its answer."""
    chosen, rejected = np.arange(2, 2 + count), np.arange(1, 1 + count)
    return "\n".join(held_out_messages(describe_pairs(ScoredPairs(chosen / 10, rejected / 10, chosen, rejected))))


@pytest.mark.parametrize(("count", "said"), [(1, False), (5, True), (40, True)])
def test_two_answers_do_not_show_that_scores_follow_length(count, said):
    assert f"held out: {count} pairs, accuracy 1.000" in told(count)
    assert ("scores follow the length of answers" in told(count)) is said


def test_an_interval_that_holds_a_half_is_no_better_than_a_coin():
    assert "no better than a coin" in told(1)
    assert "no better than a coin" not in told(40)
