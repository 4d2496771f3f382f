from __future__ import annotations

import pytest
import torch

from align.engine.protocol import Sampling
from align.engine.sampling import RowSampler, gumbel_noise, keep_top_p
from align.errors import UsageError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def draw(sampling: Sampling, times: int) -> torch.Tensor:
    sampler = RowSampler([sampling], [0])
    drawn = [sampler(torch.zeros(1, 1), LOGITS[None]).argmax().item() for _ in range(times)]
    return torch.bincount(torch.tensor(drawn), minlength=4) / times


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    shares = draw(Sampling(temperature=temperature), 4000)

    # Four standard errors of a share of one half over 4000 draws.
    assert torch.allclose(shares, (LOGITS / temperature).softmax(-1), atol=4 * 0.5 / 4000**0.5)


def test_temperature_zero_takes_the_largest():
    assert draw(Sampling(temperature=0), 50)[0] == 1


def test_top_p_keeps_the_smallest_set_with_that_much_probability():
    # Probabilities 0.644, 0.237, 0.087, 0.032: two tokens reach 0.8, three reach 0.9.
    assert keep_top_p(LOGITS, 0.8).isfinite().tolist() == [True, True, False, False]
    assert keep_top_p(LOGITS, 0.9).isfinite().tolist() == [True, True, True, False]
    assert keep_top_p(LOGITS, 1e-6).isfinite().tolist() == [True, False, False, False]
    assert keep_top_p(LOGITS, 1.0) is LOGITS


def test_a_row_draws_the_same_beside_any_other_row():
    alone = RowSampler([Sampling()], [7])
    beside = RowSampler([Sampling(temperature=0), Sampling()], [1, 7])

    for _ in range(5):
        one = alone(torch.zeros(1, 1), LOGITS[None])[0]
        two = beside(torch.zeros(2, 1), LOGITS.repeat(2, 1))[1]
        assert torch.equal(one, two)


def test_equal_seeds_share_their_noise_and_others_do_not():
    noise = [gumbel_noise(8, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]

    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_rows_with_logits_that_are_not_finite_are_named():
    sampler = RowSampler([Sampling()] * 4, [0] * 4)
    scores = LOGITS.repeat(4, 1)
    scores[1, 2] = float("nan")
    scores[2, 0] = float("inf")
    scores[3, 0] = float("-inf")  # a token that is ruled out is no damage

    sampler(torch.zeros(4, 1), scores)

    assert sampler.bad_rows == {1, 2}


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"temperature": float("nan")}]
)
def test_sampling_out_of_range_is_refused(options):
    with pytest.raises(UsageError):
        Sampling(**options)
