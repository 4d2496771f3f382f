"""Measures of a model: means and ratios over records, their intervals, and paired comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from align.evaluation.metric import Metric, compare_metrics, estimate_metric, mean_metric, ratio_metric
from align.statistics import Resamples


def test_a_paired_difference_is_surer_than_two_means():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    ours, theirs = mean_metric("m", hard + 0.2 + 0.1 * rng.normal(size=200)), mean_metric("m", hard)
    resamples = Resamples(200)

    found = compare_metrics(ours, theirs, resamples)

    one = estimate_metric(ours, resamples)
    assert found.high - found.low < 0.2 * (one.high - one.low)
    assert found.verdict == "better"
    assert found.difference == pytest.approx(ours.value - theirs.value)


def test_a_share_of_which_all_are_right_is_not_certain():
    found = estimate_metric(mean_metric("m", [1.0] * 24), Resamples(24))

    assert (found.value, found.high) == (1.0, pytest.approx(1.0))
    assert found.low == pytest.approx(0.862, abs=0.001)  # Wilson: 24 / (24 + 1.96^2)


def test_records_a_measure_does_not_apply_to_do_not_count():
    found = mean_metric("m", [1.0, float("nan"), 0.0])

    assert (found.value, found.count) == (0.5, 2)
    assert ratio_metric("r", [2.0, 0.0, 4.0], [1.0, 0.0, 3.0]).value == 1.5
    assert ratio_metric("r", [2.0, 0.0, 4.0], [1.0, 0.0, 3.0]).count == 2


def test_wins_follow_what_is_better_and_ties_are_left_out():
    ours = mean_metric("m", [1.0, 2.0, 3.0, 5.0], better="lower")
    theirs = mean_metric("m", [2.0, 3.0, 3.0, 4.0], better="lower")

    found = compare_metrics(ours, theirs, Resamples(4))

    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.p == 1.0


def test_a_measure_of_one_record_has_no_interval():
    found = estimate_metric(mean_metric("m", [0.4]), Resamples(1))

    assert found.value == 0.4
    assert found.low != found.low


def test_a_slice_is_the_measure_of_its_records():
    whole = mean_metric("m", [0.0, 1.0, 0.5])

    part = whole.select(np.array([1, 2]))

    assert isinstance(part, Metric)
    assert part.value == 0.75


def test_a_difference_is_of_the_records_that_both_models_have():
    ours, theirs = mean_metric("score", [1.0, 0.0, np.nan, 1.0]), mean_metric("score", [0.0, 0.0, 0.0, np.nan])

    found = compare_metrics(ours, theirs, Resamples(4))

    assert found.difference == pytest.approx(0.5)
    assert (found.wins, found.ties, found.losses) == (1, 1, 0)
    assert found.low <= 0.5 <= found.high
    assert not mean_metric("score", [1.0, np.nan]).shares_records_with(mean_metric("score", [np.nan, 1.0]))


def test_an_interval_without_width_ends_at_its_value():
    found = estimate_metric(mean_metric("score", [0.7 + 0.1 / 8] * 33), Resamples(33))

    assert found.low == found.value == found.high
