"""Intervals cover the truth as often as they say, and the sign test is scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from align.evaluation.measures import Measure, compare, estimate, mean_of, ratio_of
from align.evaluation.statistics import Resamples, expanded_interval, sign_test, student_quantile

DRAWS = {
    "a share": (lambda rng, shape: (rng.random(shape) < 0.3).astype(float), 0.3),
    "scores in [0, 1]": (lambda rng, shape: rng.beta(2, 1, shape), 2 / 3),
    "skewed lengths": (lambda rng, shape: rng.gamma(2.0, 20.0, shape), 40.0),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("size", [60, 300])
def test_intervals_cover_the_true_mean_93_to_97_times_in_100(kind, size):
    draw, truth = DRAWS[kind]
    samples = draw(np.random.default_rng(size), (size, 1500))
    values = Resamples(size, 0, 1000).sums(samples) / size

    intervals = [expanded_interval(column, size) for column in values.T]

    assert 0.93 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.97


def test_paired_intervals_cover_the_true_difference_93_to_97_times_in_100():
    rng = np.random.default_rng(7)
    shared = rng.normal(size=(100, 1500))
    ours, theirs = (shared + rng.normal(0.1 * k, 0.5, shared.shape) for k in (2, 1))
    values = Resamples(100, 0, 1000).sums(ours - theirs) / 100

    hits = [low <= 0.1 <= high for low, high in (expanded_interval(column, 100) for column in values.T)]

    assert 0.93 <= np.mean(hits) <= 0.97


def test_a_paired_difference_is_surer_than_two_means():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    ours, theirs = mean_of("m", hard + 0.2 + 0.1 * rng.normal(size=200)), mean_of("m", hard)
    resamples = Resamples(200)

    found = compare(ours, theirs, resamples)

    one = estimate(ours, resamples)
    assert found.high - found.low < 0.2 * (one.high - one.low)
    assert found.verdict == "better"
    assert found.difference == pytest.approx(ours.value - theirs.value)


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (5, 5), (7, 3), (3, 7), (24, 0), (300, 200), (4000, 4100)]
)
def test_the_sign_test_is_scipys(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0

    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degrees", [3, 5, 10, 100, 5000])
def test_students_quantile_is_scipys(degrees):
    assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.002)


def test_large_data_is_resampled_in_blocks_with_the_same_result():
    parts = np.random.default_rng(0).random((5000, 2))
    kept, drawn = Resamples(5000, 3, 2000), Resamples(5000, 3, 20_000)

    first, more = kept.sums(parts), drawn.sums(parts)

    assert np.array_equal(first[:800], more[:800])
    assert kept.sums(parts) == pytest.approx(first)
    assert first.mean(axis=0) == pytest.approx(parts.sum(axis=0), rel=0.01)


def test_a_share_of_which_all_are_right_is_not_certain():
    found = estimate(mean_of("m", [1.0] * 24), Resamples(24))

    assert (found.value, found.high) == (1.0, pytest.approx(1.0))
    assert found.low == pytest.approx(0.862, abs=0.001)  # Wilson: 24 / (24 + 1.96^2)


def test_records_a_measure_does_not_apply_to_do_not_count():
    found = mean_of("m", [1.0, float("nan"), 0.0])

    assert (found.value, found.count) == (0.5, 2)
    assert ratio_of("r", [2.0, 0.0, 4.0], [1.0, 0.0, 3.0]).value == 1.5
    assert ratio_of("r", [2.0, 0.0, 4.0], [1.0, 0.0, 3.0]).count == 2


def test_wins_follow_what_is_better_and_ties_are_left_out():
    ours = mean_of("m", [1.0, 2.0, 3.0, 5.0], better="lower")
    theirs = mean_of("m", [2.0, 3.0, 3.0, 4.0], better="lower")

    found = compare(ours, theirs, Resamples(4))

    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.p == 1.0


def test_a_measure_of_one_record_has_no_interval():
    found = estimate(mean_of("m", [0.4]), Resamples(1))

    assert found.value == 0.4
    assert found.low != found.low


def test_a_slice_is_the_measure_of_its_records():
    whole = mean_of("m", [0.0, 1.0, 0.5])

    part = whole.take(np.array([1, 2]))

    assert isinstance(part, Measure)
    assert part.value == 0.75


def test_a_difference_is_of_the_records_that_both_models_have():
    ours, theirs = mean_of("score", [1.0, 0.0, np.nan, 1.0]), mean_of("score", [0.0, 0.0, 0.0, np.nan])

    found = compare(ours, theirs, Resamples(4))

    assert found.difference == pytest.approx(0.5)
    assert (found.wins, found.ties, found.losses) == (1, 1, 0)
    assert found.low <= 0.5 <= found.high
    assert not mean_of("score", [1.0, np.nan]).meets(mean_of("score", [np.nan, 1.0]))


def test_an_interval_without_width_ends_at_its_value():
    found = estimate(mean_of("score", [0.7 + 0.1 / 8] * 33), Resamples(33))

    assert found.low == found.value == found.high
