"""Intervals cover the truth as often as they say; tests, agreement and rank measures against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from align.statistics import (
    Resamples,
    auc,
    cohen_kappa,
    correlation,
    expanded_interval,
    sign_test,
    student_quantile,
    wilson_interval,
)

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


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (5, 5), (7, 3), (3, 7), (24, 0), (300, 200), (4000, 4100)]
)
def test_the_sign_test_is_scipys(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0

    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_by_hand():
    exact = 2 * sum(math.comb(50, k) for k in range(35, 51)) / 2**50

    assert sign_test(35, 15) == pytest.approx(exact, rel=1e-9)
    assert sign_test(25, 25) == 1.0


@pytest.mark.parametrize("degrees", [3, 5, 10, 100, 5000])
def test_students_quantile_is_scipys(degrees):
    assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


def test_large_data_is_resampled_in_blocks_with_the_same_result():
    parts = np.random.default_rng(0).random((5000, 2))
    kept, drawn = Resamples(5000, 3, 2000), Resamples(5000, 3, 20_000)

    first, more = kept.sums(parts), drawn.sums(parts)

    assert np.array_equal(first[:800], more[:800])
    assert kept.sums(parts) == pytest.approx(first)
    assert first.mean(axis=0) == pytest.approx(parts.sum(axis=0), rel=0.01)


def test_the_interval_of_a_share_is_wilsons():
    # z = 1.959964, z^2 = 3.841459. 8 of 10: whole 1.3841459, centre (0.8 + 0.19207295) / whole = 0.716740,
    # half 1.959964 * sqrt(0.8 * 0.2 / 10 + 3.841459 / 400) / whole = 0.226577
    share = wilson_interval(0.8, 10)

    assert share.low == pytest.approx(0.490162, abs=1e-5)
    assert share.high == pytest.approx(0.943318, abs=1e-5)


def test_the_interval_of_a_perfect_share_has_a_width_and_stays_within_one():
    share = wilson_interval(1.0, 20)

    # centre + half = 1, and low = 1 / (1 + z^2 / n)
    assert share.high == pytest.approx(1.0)
    assert share.low == pytest.approx(1 / (1 + 3.841459 / 20), abs=1e-6)


def test_correlation_by_hand_and_none_where_nothing_varies():
    # x - mean = -1, 0, 1 and y - mean = -1, 1, 0: 1 / sqrt(2 * 2)
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    assert correlation(np.array([1.0, 1, 1]), np.array([1.0, 3, 2])) is None


def test_auc_is_the_share_of_pairs_in_the_right_order():
    # good 3, 1; bad 2, 1: 3 > 2, 3 > 1, 1 < 2, 1 = 1 -> 2.5 of 4
    assert auc(np.array([3.0, 1, 2, 1]), np.array([True, True, False, False])) == pytest.approx(2.5 / 4)
    assert auc(np.array([3.0, 1]), np.array([True, True])) is None


def test_a_quantile_of_student_is_the_tabled_one():
    tabled = {4: 2.776, 10: 2.228, 30: 2.042, 1000: 1.962}

    assert {freedom: student_quantile(0.975, freedom) for freedom in tabled} == pytest.approx(tabled, abs=5e-4)


def test_kappa_by_hand():
    # 7 of 10 alike; chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5: (0.7 - 0.5) / (1 - 0.5)
    pairs = [(1, 1)] * 4 + [(1, 0)] + [(0, 0)] * 3 + [(0, 1)] * 2

    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([(1, 1), (1, 1)]) == 0.0
