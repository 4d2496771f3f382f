"""Accuracy, calibration and length bias against numbers worked by hand."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from align.evaluation.reward_report import (
    ScoredPairs,
    accuracy,
    brier,
    calibration_error,
    describe_pairs,
    draw_functions,
    reliability,
)

LN3 = math.log(3)  # sigmoid(ln 3) = 3/4


def test_accuracy_counts_a_pair_of_equal_scores_as_half():
    assert accuracy(np.array([2.0, -1.0, 0.0, 0.5])).mean == 2.5 / 4


def test_reliability_sees_every_pair_in_both_orders():
    # Four pairs at 3/4, three of them right: seen both ways, bin 0.7 holds 3 chosen and 1 that was not; 0.2 mirrors it.
    curve = reliability(np.array([LN3, LN3, LN3, -LN3]))

    assert curve.predicted == pytest.approx([0.25, 0.75])
    assert curve.observed == pytest.approx([0.25, 0.75])
    assert curve.counts.tolist() == [4, 4]


def test_a_model_that_is_as_right_as_it_says_has_no_calibration_error():
    assert calibration_error(reliability(np.array([LN3, LN3, LN3, -LN3]))) == pytest.approx(0)


def test_calibration_error_is_the_weighted_distance_of_the_bins():
    # Two pairs at 3/4, both right (distance 1/4), and two at 1/2 (distance 0): over eight views (4 * 1/4 + 4 * 0) / 8.
    assert calibration_error(reliability(np.array([LN3, LN3, 0.0, 0.0]))) == pytest.approx(1 / 8)


def test_a_probability_of_one_falls_into_the_last_bin():
    curve = reliability(np.array([1000.0]))

    assert curve.predicted.tolist() == [0.0, 1.0]
    assert curve.observed.tolist() == [0.0, 1.0]


def test_brier_is_a_quarter_for_a_coin_and_by_hand_otherwise():
    assert brier(np.zeros(3)) == pytest.approx(0.25)
    # (1 - 3/4)^2 and (1 - 1/4)^2
    assert brier(np.array([LN3, -LN3])) == pytest.approx((1 / 16 + 9 / 16) / 2)


def pairs(margins, chosen_lengths, rejected_lengths) -> ScoredPairs:
    chosen = np.array(margins, dtype=float)
    return ScoredPairs(chosen, np.zeros_like(chosen), np.array(chosen_lengths), np.array(rejected_lengths))


def test_length_bias_is_told_apart_by_which_answer_is_shorter():
    # Right on the two pairs whose chosen answer is longer, wrong on the shorter one, right on the one of equal lengths.
    numbers = describe_pairs(pairs([1, 1, -1, 1], [9, 8, 2, 5], [3, 4, 6, 5]))

    assert numbers["accuracy_chosen_longer"] == 1
    assert numbers["accuracy_chosen_shorter"] == 0
    assert numbers["accuracy_of_longer"] == 2.5 / 4
    assert numbers["held_out_accuracy"] == 3 / 4
    assert numbers["held_out_pairs"] == 4
    assert numbers["score_chosen"] == 0.5
    assert numbers["held_out_loss"] == pytest.approx((3 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 4)


def test_what_cannot_be_computed_is_left_out_and_the_rest_is_finite():
    numbers = describe_pairs(pairs([0.0, 0.0], [4, 4], [2, 3]))

    assert not {"length_correlation", "accuracy_chosen_shorter"} & numbers.keys()
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["held_out_accuracy"] == 0.5
    assert numbers["held_out_loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("scores", [[0.3], [0.0, 0.0], [1e4, -1e4, 2.0]])
def test_the_panels_draw_any_scores(scores, tmp_path):
    found = pairs(scores, [3] * len(scores), [2] * len(scores))
    figure = Figure()

    for place, draw in enumerate(draw_functions(found), start=1):
        draw(figure.add_subplot(1, 2, place))

    figure.savefig(tmp_path / "panels.png")
    assert [axes.get_title() for axes in figure.axes][1] == f"scores of {len(scores)} held-out pairs"
    assert figure.axes[0].get_title().startswith("calibration (ECE ")
