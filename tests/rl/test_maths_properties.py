"""PPO's formulas against slow ones in plain Python that know neither tensors nor masks nor padding.

A rollout is drawn as rows of unequal length, empty ones included; the tensors hold junk where a row has ended.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.rl import maths

CHECKED = settings(max_examples=60)
NUMBERS = st.floats(-4, 4, allow_subnormal=False)
LOGPROBS = st.floats(-4, 0, allow_subnormal=False)
SHARES = st.floats(0.01, 1)
PADDING = st.tuples(st.integers(0, 2), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))


def rows_of(*columns):
    """Rows of 0 to 5 tokens, a token being one number of each column."""
    return st.lists(st.lists(st.tuples(*columns), max_size=5), min_size=1, max_size=4)


class Rollout:
    """The columns of some rows, as lists without padding and as (B, T) tensors with it."""

    def __init__(self, rows, padding):
        more, self.junk = padding
        self.lengths = [len(row) for row in rows]
        self.width = max(1, *self.lengths) + more
        count = next((len(row[0]) for row in rows if row), 0)
        self.lists = [[[token[column] for token in row] for row in rows] for column in range(count)]
        self.tensors = [self.padded(column) for column in self.lists]
        self.mask = double([[float(t < length) for t in range(self.width)] for length in self.lengths])
        self.empty = count == 0

    def padded(self, column):
        filled = [row + [self.junk] * (self.width - len(row)) for row in column]
        return double(filled)

    def column(self, index):
        """The lists and the tensor of a column; of a rollout without any token, empty lists and nothing but junk."""
        if self.empty:
            return [[] for _ in self.lengths], self.padded([[] for _ in self.lengths])
        return self.lists[index], self.tensors[index]

    def columns(self, count):
        lists, tensors = zip(*[self.column(index) for index in range(count)], strict=True)
        return lists, tensors

    def holds(self, tensor, expected):
        """Whether a tensor is these rows, and exactly zero on all padding."""
        for row, length, wanted in zip(tensor.tolist(), self.lengths, expected, strict=True):
            assert row[:length] == pytest.approx(wanted, rel=1e-7, abs=1e-7)
            assert all(value == 0.0 for value in row[length:])


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def flat(rows):
    return [value for row in rows for value in row]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def variance(values):
    return mean([(value - mean(values)) ** 2 for value in values])


@CHECKED
@given(rows_of(NUMBERS), PADDING)
def test_masked_sums_means_and_variances(rows, padding):
    rollout = Rollout(rows, padding)
    lists, tensor = rollout.column(0)

    kept = flat(lists)
    assert maths.masked_sum(tensor, rollout.mask).item() == pytest.approx(math.fsum(kept), abs=1e-9)
    assert maths.masked_mean(tensor, rollout.mask).item() == pytest.approx(mean(kept), abs=1e-9)
    assert maths.masked_var(tensor, rollout.mask).item() == pytest.approx(variance(kept), abs=1e-9)


@CHECKED
@given(rows_of(NUMBERS), PADDING, st.booleans())
def test_whitening(rows, padding, shift):
    rollout = Rollout(rows, padding)
    lists, tensor = rollout.column(0)

    middle, scale = mean(flat(lists)), math.sqrt(variance(flat(lists)) + 1e-8)
    expected = [[(value - middle) / scale + (0 if shift else middle) for value in row] for row in lists]
    rollout.holds(maths.whiten(tensor, rollout.mask, shift_mean=shift), expected)


@CHECKED
@given(rows_of(LOGPROBS, LOGPROBS))
def test_kl_estimators(rows):
    for policy, ref in flat(rows):
        ratio = math.exp(ref) / math.exp(policy)
        wanted = {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": ratio - 1 - math.log(ratio)}
        for name, value in wanted.items():
            found = maths.kl_per_token(double([[policy]]), double([[ref]]), name).item()
            assert found == pytest.approx(value, rel=1e-9, abs=1e-12)


@CHECKED
@given(rows_of(NUMBERS), PADDING, st.lists(NUMBERS, min_size=4, max_size=4), st.floats(0, 2))
def test_token_rewards(rows, padding, scores, kl_coef):
    rollout = Rollout(rows, padding)
    lists, tensor = rollout.column(0)

    expected = [[-kl_coef * value for value in row] for row in lists]
    for row, score in zip(expected, scores, strict=False):
        if row:
            row[-1] += score
    given_scores = double(scores[: len(rows)])
    rollout.holds(maths.token_rewards(given_scores, tensor, rollout.mask, kl_coef), expected)


def lambda_return(rewards, values, start, gamma, lam):
    """The mean of the n-step returns from `start`, the n-th weighing (1 - lam) lam^(n - 1), the last all the rest."""
    values, left = [*values, 0.0], len(rewards) - start

    def n_step(n):
        return sum(gamma**i * rewards[start + i] for i in range(n)) + gamma**n * values[start + n]

    weighted = [(1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, left)]
    return math.fsum(weighted) + lam ** (left - 1) * n_step(left)


@CHECKED
@given(rows_of(NUMBERS, NUMBERS), PADDING, SHARES, st.floats(0, 1))
def test_returns_are_means_of_n_step_returns_and_advantages_what_they_add_to_the_value(rows, padding, gamma, lam):
    rollout = Rollout(rows, padding)
    (rewards, values), tensors = rollout.columns(2)

    advantages, returns = maths.gae(*tensors, rollout.mask, gamma, lam)

    expected = [
        [lambda_return(reward, value, start, gamma, lam) for start in range(len(reward))]
        for reward, value in zip(rewards, values, strict=True)
    ]
    rollout.holds(returns, expected)
    rollout.holds(
        advantages, [[g - v for g, v in zip(*pair, strict=True)] for pair in zip(expected, values, strict=True)]
    )


@CHECKED
@given(rows_of(LOGPROBS, LOGPROBS, NUMBERS), PADDING, SHARES)
def test_clipped_policy_loss(rows, padding, cliprange):
    rollout = Rollout(rows, padding)
    lists, (new, old, advantages) = rollout.columns(3)
    new.requires_grad_()

    loss, metrics = maths.policy_loss(new, old, advantages, rollout.mask, cliprange)
    loss.backward()

    terms, ratios, slopes = [], [], []
    count = max(1, sum(rollout.lengths))
    for after, before, advantage in zip(*map(flat, lists), strict=True):
        ratio = math.exp(after - before)
        held = min(max(ratio, 1 - cliprange), 1 + cliprange)
        terms.append(min(ratio * advantage, held * advantage))
        ratios.append(ratio)
        # The slope of -r A in log r, or 0 where the clip binds; at the very bound either will do.
        at_bound = abs(abs(ratio - 1) - cliprange) < 1e-9
        slopes.append(None if at_bound else -terms[-1] / count if terms[-1] == ratio * advantage else 0.0)
    assert loss.item() == pytest.approx(-mean(terms), abs=1e-9)
    assert metrics["ratio"].item() == pytest.approx(mean(ratios), abs=1e-9)
    assert metrics["ratio_error"].item() == pytest.approx(max([abs(r - 1) for r in ratios], default=0), abs=1e-9)
    assert metrics["approx_kl"].item() == pytest.approx(mean(r - 1 - math.log(r) for r in ratios), abs=1e-9)
    follows(new.grad, rollout, slopes)


def follows(gradient, rollout, slopes):
    """Whether a gradient has these slopes on the kept tokens, where one is known, and is exactly zero on padding."""
    for found, slope in zip(gradient[rollout.mask == 1].tolist(), slopes, strict=True):
        assert slope is None or found == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert (gradient[rollout.mask == 0] == 0).all()


@CHECKED
@given(rows_of(NUMBERS, NUMBERS, NUMBERS), PADDING, SHARES)
def test_clipped_value_loss(rows, padding, cliprange):
    rollout = Rollout(rows, padding)
    lists, (new, old, returns) = rollout.columns(3)
    new.requires_grad_()

    loss, metrics = maths.value_loss(new, old, returns, rollout.mask, cliprange)
    loss.backward()

    terms, bound, slopes = [], [], []
    count = max(1, sum(rollout.lengths))
    for value, before, wanted in zip(*map(flat, lists), strict=True):
        held = min(max(value, before - cliprange), before + cliprange)
        near, far = (value - wanted) ** 2, (held - wanted) ** 2
        terms.append(max(near, far))
        # Where the two are equal but for rounding, either may count.
        bound.append((far > near + 1e-9, far > near - 1e-9))
        unclear = bound[-1] == (False, True) and held != value
        slopes.append(
            None
            if unclear or abs(abs(value - before) - cliprange) < 1e-9
            else 0.0
            if bound[-1][0]
            else (value - wanted) / count
        )
    assert loss.item() == pytest.approx(mean(terms) / 2, abs=1e-9)
    share = metrics["value_clip_fraction"].item()
    assert mean(float(clear) for clear, _ in bound) - 1e-6 <= share
    assert share <= mean(float(possible) for _, possible in bound) + 1e-6
    follows(new.grad, rollout, slopes)


@CHECKED
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6), st.integers(0, 5))
def test_log_probabilities_and_entropy(logits, token):
    token %= len(logits)
    largest = max(logits)
    total = math.fsum(math.exp(logit - largest) for logit in logits)
    logprobs = [logit - largest - math.log(total) for logit in logits]

    tensor = torch.tensor([[logits]])
    found = maths.token_logprobs(tensor, torch.tensor([[token]]))

    assert found.item() == pytest.approx(logprobs[token], rel=1e-5, abs=1e-5)
    expected = -math.fsum(math.exp(logprob) * logprob for logprob in logprobs)
    assert maths.entropy(tensor).item() == pytest.approx(expected, abs=1e-5)


@CHECKED
@given(rows_of(NUMBERS, NUMBERS), PADDING)
def test_explained_variance(rows, padding):
    rollout = Rollout(rows, padding)
    (values, returns), tensors = rollout.columns(2)

    missed = [wanted - value for value, wanted in zip(flat(values), flat(returns), strict=True)]
    expected = 1 - variance(missed) / max(variance(flat(returns)), 1e-8)
    assert maths.explained_variance(*tensors, rollout.mask).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
