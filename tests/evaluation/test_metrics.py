import numpy as np
import pytest

from align.errors import DataError
from align.evaluation import Interval, mean_interval


def test_interval_equals_the_closed_form_on_a_hand_worked_example():
    # mean 3, variance (4 + 1 + 0 + 1 + 4) / 4 = 2.5, standard error sqrt(2.5 / 5) = 0.70711, times 1.95996
    found = mean_interval([1, 2, 3, 4, 5])

    assert found.mean == 3
    assert found.high - 3 == pytest.approx(1.3859, abs=1e-4)
    assert 3 - found.low == pytest.approx(1.3859, abs=1e-4)


def test_interval_of_a_share_is_the_wald_interval():
    found = mean_interval([1] * 300 + [0] * 100)

    assert found.mean == 0.75
    assert found.high - 0.75 == pytest.approx(1.959964 * (0.75 * 0.25 / 399) ** 0.5)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    samples = rng.beta(2, 1, size=(4000, 200))

    hits = [interval.low <= 2 / 3 <= interval.high for interval in map(mean_interval, samples)]

    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([0.5, 0.5]) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_are_refused(values):
    with pytest.raises(DataError, match="two or more"):
        mean_interval(values)


def test_overlap_is_symmetric_and_counts_touching():
    low, high, far = Interval(1, 0, 2), Interval(3, 2, 4), Interval(6, 5, 7)

    assert low.overlaps(high)
    assert high.overlaps(low)
    assert not low.overlaps(far)
    assert not far.overlaps(low)
