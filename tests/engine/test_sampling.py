from __future__ import annotations

import pytest
import torch

from align.engine.protocol import Sampling
from align.engine.sampling import RowSampler, sample_tokens
from align.errors import UsageError
from align.models.decoding import gumbel_noise

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def shares(sampling: Sampling, times: int) -> torch.Tensor:
    """How often each token of LOGITS is drawn, each time by a row with a seed of its own."""
    rows = [RowSampler(sampling, seed, []) for seed in range(times)]
    return torch.bincount(sample_tokens(LOGITS.repeat(times, 1), rows), minlength=4) / times


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    found = shares(Sampling(temperature=temperature), 40000)

    # Four standard errors of a share of one half over 40000 draws.
    assert torch.allclose(found, (LOGITS / temperature).softmax(-1), atol=4 * 0.5 / 40000**0.5)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-7, 1e-40])
def test_a_temperature_next_to_nothing_takes_the_largest_logit(temperature, options):
    rows = [RowSampler(Sampling(temperature=temperature, **options), seed, []) for seed in range(50)]

    assert set(sample_tokens(LOGITS.flip(0).repeat(50, 1), rows).tolist()) == {3}


def test_the_draws_of_one_row_follow_the_softmax_too():
    row, counts = RowSampler(Sampling(temperature=1.0), 3, []), torch.zeros(4)
    for _ in range(4000):
        token = int(sample_tokens(LOGITS[None], [row]))
        row.took(token)
        counts[token] += 1

    assert torch.allclose(counts / 4000, LOGITS.softmax(-1), atol=4 * 0.5 / 4000**0.5)


def test_temperature_zero_takes_the_largest():
    assert shares(Sampling(temperature=0), 50)[0] == 1


def test_top_p_is_taken_of_what_top_k_left():
    row = RowSampler(Sampling(temperature=1.0, top_k=2, top_p=0.7), 0, [])

    # Of the two that are left the likelier has 0.731.
    assert row.shape(LOGITS).isfinite().tolist() == [True, False, False, False]


def test_penalties_are_those_of_ctrl_and_of_the_openai_api():
    repeated = RowSampler(Sampling(temperature=0, repetition_penalty=2.0), 0, [0, 3])
    repeated.took(1)
    counted = RowSampler(Sampling(temperature=0, frequency_penalty=0.5, presence_penalty=0.25), 0, [0])
    for token in (1, 1, 2):
        counted.took(token)

    # Positive logits are divided, negative ones multiplied, of the prompt and of the answer alike.
    assert repeated.shape(LOGITS).tolist() == [1.0, 0.5, 0.0, -2.0]
    # Only the answer counts: token 1 came twice, token 2 once.
    assert counted.shape(LOGITS).tolist() == [2.0, 1.0 - 2 * 0.5 - 0.25, 0.0 - 0.5 - 0.25, -1.0]


def test_a_row_draws_the_same_beside_any_other_row():
    alone = RowSampler(Sampling(), 7, [])
    beside = RowSampler(Sampling(), 7, [])

    for _ in range(20):
        one = int(sample_tokens(LOGITS[None], [alone])[0])
        others = [RowSampler(Sampling(temperature=0), 1, []), beside, RowSampler(Sampling(top_k=2), 2, [])]
        two = int(sample_tokens(LOGITS.repeat(3, 1), others)[1])
        alone.took(one)
        beside.took(two)
        assert one == two


def test_equal_keys_share_their_noise_and_others_do_not():
    noise = gumbel_noise([RowSampler(Sampling(), seed, []).key for seed in (3, 3, 4)], 8)

    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_the_noise_of_a_seed_is_the_same_in_every_version():
    noise = gumbel_noise([RowSampler(Sampling(), 0, []).key], 4)

    assert noise[0].tolist() == pytest.approx([1.6009, 1.1961, 0.3914, -0.4121], abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"frequency_penalty": 3},
        {"presence_penalty": -3},
        {"stop": ("",)},
        {"stop": "END"},
    ],
)
def test_sampling_out_of_range_is_refused(options):
    with pytest.raises(UsageError):
        Sampling(**options)
