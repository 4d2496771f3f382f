"""PPO's formulas against numbers worked by hand and against slow, separately written loops."""

import math

import pytest
import torch

from align.rl import maths


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_masked_mean_and_variance_ignore_what_is_masked():
    """Kept values 1, 3 and 5: mean 3, variance (4 + 0 + 4) / 3."""
    values = tensor([1.0, 3.0, float("nan")], [5.0, 9.0, 9.0])
    mask = tensor([1, 1, 0], [1, 0, 0])

    assert maths.masked_mean(values, mask).item() == 3.0
    assert maths.masked_var(values, mask).item() == pytest.approx(8 / 3)


def test_masked_mean_of_nothing_is_zero():
    assert maths.masked_mean(tensor([1.0, 2.0]), tensor([0, 0])).item() == 0.0


def test_whiten_gives_zero_mean_and_unit_variance():
    """Values 1 and 3: mean 2, deviation 1, so -1 and 1; with the mean kept, 1 and 3."""
    values, mask = tensor([1.0, 3.0, 7.0]), tensor([1, 1, 0])

    torch.testing.assert_close(maths.whiten(values, mask), tensor([-1.0, 1.0, 0.0]), atol=1e-7, rtol=0)
    kept = maths.whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept, tensor([1.0, 3.0, 0.0]), atol=1e-7, rtol=0)


def test_whiten_of_equal_values_stays_finite():
    assert maths.whiten(tensor([2.0, 2.0]), tensor([1, 1])).tolist() == [[0.0, 0.0]]


def test_kl_estimators():
    """policy 0.5 and ref 0.25: r = 1/2, k1 = log 2, k2 = (log 2)^2 / 2, k3 = (1/2 - 1) + log 2."""
    logprobs, ref = tensor([math.log(0.5)]), tensor([math.log(0.25)])

    assert maths.kl_per_token(logprobs, ref, "k1").item() == pytest.approx(math.log(2))
    assert maths.kl_per_token(logprobs, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert maths.kl_per_token(logprobs, ref, "k3").item() == pytest.approx(math.log(2) - 0.5)
    assert maths.kl_per_token(ref, logprobs, "k1").item() == pytest.approx(-math.log(2))
    assert maths.kl_per_token(ref, logprobs, "k3").item() == pytest.approx(1 - math.log(2))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_equal_policies_is_exactly_zero(estimator):
    logprobs = torch.randn(4, 7).log_softmax(-1)

    assert (maths.kl_per_token(logprobs, logprobs.clone(), estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_average_to_the_true_divergence(estimator):
    """Summed over every outcome with the policy's probabilities, each estimator is KL(policy || ref)."""
    policy, ref = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.5, 0.3]).double()

    expected = (policy * (policy / ref).log()).sum()
    estimate = (policy * maths.kl_per_token(policy.log(), ref.log(), estimator)).sum()

    torch.testing.assert_close(estimate, expected)


def test_token_rewards_put_the_score_on_the_last_token():
    """kl_coef 0.1: each token pays a tenth of its KL; scores 2 and -1 arrive on tokens 3 and 1."""
    kl = tensor([1.0, 2.0, 3.0], [4.0, float("nan"), 0.0])
    mask = tensor([1, 1, 1], [1, 0, 0])

    rewards = maths.token_rewards(torch.tensor([2.0, -1.0]), kl, mask, kl_coef=0.1)

    torch.testing.assert_close(rewards, tensor([-0.1, -0.2, 1.7], [-1.4, 0.0, 0.0]))


def test_gae_worked_by_hand():
    """gamma 0.5, lam 0.5, rewards 1, 0, 2, values 1, 2, 4, so gamma * lam = 0.25.

    delta_3 = 2 - 4 = -2;  delta_2 = 0 + 0.5 * 4 - 2 = 0;  delta_1 = 1 + 0.5 * 2 - 1 = 1
    A_3 = -2;  A_2 = 0 + 0.25 * -2 = -0.5;  A_1 = 1 + 0.25 * -0.5 = 0.875
    returns = A + V = 1.875, 1.5, 2
    """
    rewards, values = tensor([1.0, 0.0, 2.0, 9.0]), tensor([1.0, 2.0, 4.0, 9.0])

    advantages, returns = maths.gae(rewards, values, tensor([1, 1, 1, 0]), gamma=0.5, lam=0.5)

    assert advantages.tolist() == [[0.875, -0.5, -2.0, 0.0]]
    assert returns.tolist() == [[1.875, 1.5, 2.0, 0.0]]


def slow_gae(rewards, values, gamma, lam):
    """Eq. 16 of the paper as it stands: a discounted sum of temporal differences for every start."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_equals_the_discounted_sum_for_every_length(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    lengths = [9, 1, 4, 8, 0]
    mask = tensor(*[[float(t < length) for t in range(9)] for length in lengths])

    advantages, returns = maths.gae(rewards, values, mask, gamma, lam)

    for row, length in enumerate(lengths):
        expected = slow_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected)
        assert returns[row, :length].tolist() == pytest.approx((advantages + values)[row, :length].tolist())
        assert (advantages[row, length:] == 0).all()
        assert (returns[row, length:] == 0).all()


def test_policy_loss_worked_by_hand():
    """cliprange 0.2 and ratios 1.5, 0.5, 1.5, 0.5 with advantages 1, 1, -1, -1.

    min(1.5, 1.2) = 1.2;  min(0.5, 0.8) = 0.5;  min(-1.5, -1.2) = -1.5;  min(-0.5, -0.8) = -0.8
    loss = -(1.2 + 0.5 - 1.5 - 0.8) / 4 = 0.15; the clip binds on the first and the last: a half.
    """
    ratio = tensor([1.5, 0.5, 1.5, 0.5, 8.0])
    advantages, mask = tensor([1.0, 1.0, -1.0, -1.0, 1.0]), tensor([1, 1, 1, 1, 0])

    loss, metrics = maths.policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, mask, cliprange=0.2)

    assert loss.item() == pytest.approx(0.15)
    assert metrics["policy_clip_fraction"].item() == 0.5
    assert metrics["ratio"].item() == pytest.approx(1.0)
    approx_kl = (1.5 - 1 - math.log(1.5) + 0.5 - 1 - math.log(0.5)) / 2
    assert metrics["approx_kl"].item() == pytest.approx(approx_kl)


def test_policy_gradient_at_ratio_one_is_the_advantage():
    """d(-r A)/d(logprob) at r = 1 is -A, divided by the number of tokens."""
    logprobs = tensor([-1.0, -2.0]).requires_grad_()

    loss, _ = maths.policy_loss(logprobs, logprobs.detach(), tensor([3.0, -4.0]), tensor([1, 1]), 0.2)
    loss.backward()

    assert logprobs.grad.tolist() == [[-1.5, 2.0]]


def test_policy_loss_gives_padding_no_gradient_and_no_number():
    logprobs = tensor([-1.0, float("-inf")]).requires_grad_()

    loss, metrics = maths.policy_loss(logprobs, tensor([-1.0, 0.0]), tensor([2.0, 5.0]), tensor([1, 0]), 0.2)
    loss.backward()

    assert loss.item() == -2.0
    assert logprobs.grad.tolist() == [[-2.0, 0.0]]
    assert metrics["ratio"].item() == 1.0


def test_value_loss_worked_by_hand():
    """Range 0.2, old value 0, return 1: value 0.5 is held at 0.2, so max(0.25, 0.64) = 0.64 and the clip binds.

    The second, value 0.1, is within the range: 0.81. Half the mean is (0.64 + 0.81) / 4 = 0.3625.
    """
    values, mask = tensor([0.5, 0.1, 7.0]), tensor([1, 1, 0])

    loss, metrics = maths.value_loss(values, torch.zeros_like(values), tensor([1.0, 1.0, 0.0]), mask, 0.2)

    assert loss.item() == pytest.approx(0.3625)
    assert metrics["value_clip_fraction"].item() == 0.5


def test_value_loss_gives_padding_no_gradient_and_no_number():
    nan = float("nan")
    values = tensor([2.0, nan]).requires_grad_()

    loss, metrics = maths.value_loss(values, tensor([2.0, nan]), tensor([1.0, nan]), tensor([1, 0]), 0.2)
    loss.backward()

    assert loss.item() == 0.5
    assert values.grad.tolist() == [[1.0, 0.0]]
    assert metrics["value_clip_fraction"].item() == 0.0


def test_running_moments_are_those_of_all_values_so_far():
    """1, 3 and 8: mean 4, squares 9 + 1 + 16 = 26."""
    moments = maths.Moments().after(torch.tensor([1.0, 3.0])).after(torch.tensor([8.0]))

    assert moments == pytest.approx((3, 4.0, 26.0))
    assert moments.deviation == pytest.approx(math.sqrt(26 / 3))


def test_scores_are_normalised_then_clipped_then_whitened():
    """Mean 4 and deviation 2: 2, 6 and 10 become -1, 1 and 3; clipped at 2.5; their mean 2.5/3."""
    scores, moments = torch.tensor([2.0, 6.0, 10.0]), maths.Moments(4, 4.0, 16.0)

    assert maths.shape_scores(scores, None, None, whitened=False).tolist() == [2.0, 6.0, 10.0]
    assert maths.shape_scores(scores, moments, None, whitened=False).tolist() == [-1.0, 1.0, 3.0]
    assert maths.shape_scores(scores, moments, 2.5, whitened=False).tolist() == [-1.0, 1.0, 2.5]
    whitened = maths.shape_scores(scores, moments, 2.5, whitened=True)
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert whitened.var(correction=0).item() == pytest.approx(1.0)


def test_logprobs_and_entropy_of_a_known_distribution():
    """Probabilities 1/2, 1/4, 1/4: entropy 1.5 log 2."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]]).log() + 3.0

    logprobs, entropy = maths.token_logprobs(logits, torch.tensor([[0, 2]])), maths.entropy(logits)

    torch.testing.assert_close(logprobs, torch.tensor([[0.5, 0.25]]).log())
    torch.testing.assert_close(entropy, torch.full((1, 2), 1.5 * math.log(2)))


def test_entropy_survives_impossible_tokens():
    logits = torch.tensor([[[0.0, float("-inf")]]])

    logprobs, entropy = maths.token_logprobs(logits, torch.tensor([[0]])), maths.entropy(logits)

    assert logprobs.item() == 0.0
    assert entropy.item() == 0.0


def test_explained_variance_of_perfect_constant_and_opposite_values():
    returns, mask = tensor([1.0, 2.0, 3.0, 99.0]), tensor([1, 1, 1, 0])

    assert maths.explained_variance(returns, returns, mask).item() == 1.0
    assert maths.explained_variance(torch.full_like(returns, 5.0), returns, mask).item() == pytest.approx(0.0)
    assert maths.explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)


def test_adaptive_coefficient_moves_towards_the_target():
    """KL twice its target: the error 1 is clipped to 0.2; with a share of a tenth the coefficient grows by 2%."""
    assert maths.next_kl_coef(0.05, kl=12.0, target=6.0, share=0.1) == pytest.approx(0.05 * 1.02)
    assert maths.next_kl_coef(0.05, kl=0.0, target=6.0, share=0.1) == pytest.approx(0.05 * 0.98)
    assert maths.next_kl_coef(0.05, kl=6.6, target=6.0, share=1.0) == pytest.approx(0.05 * 1.1)
    assert maths.next_kl_coef(0.05, kl=6.0, target=6.0, share=1.0) == 0.05
