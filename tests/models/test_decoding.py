"""The kernel of decoding: its cache, its filters and its two ways to sample."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, set_seed

from align.models.decoding import (
    CachedRows,
    Decoder,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    gumbel_noise,
    pad_left,
    sample_from_uniform,
)

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
SIZE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("sliding", [False, True])
def test_rows_that_join_and_leave_have_the_logits_of_a_plain_pass(sliding):
    set_seed(0)
    if sliding:
        model = MistralForCausalLM(MistralConfig(**SIZE, sliding_window=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZE))
    model.eval()
    rows = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    decoder = Decoder(model)
    ids, mask = pad_left(rows[:2], 0, "cpu")
    cached = CachedRows(mask)
    others, other_mask = pad_left(rows[2:], 0, "cpu")
    joining = CachedRows(other_mask)

    with torch.no_grad():
        decoder.prefill(cached, ids, 0, 3)
        decoder.prefill(cached, ids, 3, 7)
        decoder.prefill(joining, others, 0, 3)
        cached.append(joining)
        logits = decoder.step(cached, torch.tensor([20, 21, 22]))
        cached.select(torch.tensor([2, 1]))
        cached.resize(4)
        later = decoder.step(cached, torch.tensor([30, 31]))

        for row, token, of_row in zip(rows, (20, 21, 22), logits, strict=True):
            torch.testing.assert_close(of_row, model(input_ids=torch.tensor([[*row, token]])).logits[0, -1])
        for row, tokens, of_row in zip((rows[2], rows[1]), ((22, 30), (21, 31)), later, strict=True):
            torch.testing.assert_close(of_row, model(input_ids=torch.tensor([[*row, *tokens]])).logits[0, -1])


def test_a_step_copies_no_keys_and_values_but_after_rows_changed():
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE)).eval()
    ids, mask = pad_left([[3, 4, 5], [6, 7]], 0, "cpu")
    decoder, cached = Decoder(model), CachedRows(mask)
    places, tokens = [], torch.tensor([20, 21])

    with torch.inference_mode():
        decoder.prefill(cached, ids, 0, 3)
        for _ in range(100):
            logits = decoder.step(cached, tokens)
            places.append(cached.cache.layers[1].keys.data_ptr())
        other, other_mask = pad_left([[8, 9]], 0, "cpu")
        joining = CachedRows(other_mask)
        decoder.prefill(joining, other, 0, 2)
        cached.append(joining)
        cached.select(torch.tensor([1, 2]))
        logits = decoder.step(cached, torch.tensor([22, 23]))
        cached.resize(50)
        later = decoder.step(cached, torch.tensor([24, 25]))
        whole = [[6, 7, *[21] * 100, 22, 24], [8, 9, 23, 25]]
        for row, of_row, of_later in zip(whole, logits, later, strict=True):
            torch.testing.assert_close(of_row, model(input_ids=torch.tensor([row[:-1]])).logits[0, -1])
            if len(row) < 50:
                torch.testing.assert_close(of_later, model(input_ids=torch.tensor([row])).logits[0, -1])

    assert len(set(places)) == 2  # allocated at the first step, and when the room was full


@pytest.mark.parametrize(
    ("ropes", "parts"),
    [
        (None, True),
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "longrope", "long_factor": [1.0]}, False),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, False),
    ],
)
def test_where_positions_turn_with_the_length_of_a_pass_prompts_are_read_at_once(ropes, parts):
    config = LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    config.rope_parameters = ropes

    class Model:
        def __init__(self):
            self.config = config

        def forward(self, input_ids, past_key_values): ...

    assert Decoder(Model()).can_prefill_in_chunks == parts


def test_noise_is_gumbel_over_a_whole_vocabulary():
    noise = gumbel_noise([(seed, seed * 7) for seed in range(8)], 50_000)

    # Mean: Euler's constant; variance: pi squared over six. Quantiles: -ln(-ln q).
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, rel=0.01)
    quantiles = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    found = torch.stack([(noise <= -(-q.log()).log()).float().mean() for q in quantiles])
    assert torch.allclose(found, quantiles, atol=0.003)
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours.item()) < 0.01
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.03


def test_top_k_and_min_p_keep_the_likeliest():
    # Probabilities 0.644, 0.237, 0.087, 0.032; shares of the likeliest 1, 0.368, 0.135, 0.050.
    assert filter_top_k(LOGITS, 2).isfinite().tolist() == [True, True, False, False]
    assert filter_top_k(LOGITS, 0) is LOGITS
    assert filter_top_k(LOGITS, 9) is LOGITS
    assert filter_min_p(LOGITS, 0.3).isfinite().tolist() == [True, True, False, False]
    assert filter_min_p(LOGITS, 1.0).isfinite().tolist() == [True, False, False, False]
    assert filter_min_p(LOGITS, 0.0) is LOGITS


def test_top_p_keeps_the_smallest_set_with_that_much_probability():
    # Probabilities 0.644, 0.237, 0.087, 0.032: two tokens reach 0.8, three reach 0.9.
    assert filter_top_p(LOGITS, 0.8).isfinite().tolist() == [True, True, False, False]
    assert filter_top_p(LOGITS, 0.9).isfinite().tolist() == [True, True, True, False]
    assert filter_top_p(LOGITS, 1e-6).isfinite().tolist() == [True, False, False, False]
    assert filter_top_p(LOGITS, 1.0) is LOGITS


def test_samples_invert_the_distribution():
    """Probabilities 0.5, 0.3, 0.2: tokens change at 0.5 and 0.8; with top_p 0.6 the first two share all at 0.625."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(6, 3)
    uniform = torch.tensor([0.0, 0.499, 0.501, 0.799, 0.801, 0.9999], dtype=torch.float64)

    assert sample_from_uniform(logits, uniform, 1.0, 1.0).tokens.tolist() == [0, 0, 1, 1, 2, 2]
    shares = torch.tensor([0.0, 0.62, 0.63, 0.9, 0.99, 0.9999], dtype=torch.float64)
    assert sample_from_uniform(logits, shares, 1.0, 0.6).tokens.tolist() == [0, 0, 1, 1, 1, 1]


def test_a_token_of_no_probability_is_never_sampled():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf")]]).expand(2, 3)

    sampled = sample_from_uniform(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0)

    assert sampled.tokens.tolist() == [1, 1]
    assert sampled.entropy.tolist() == [0.0, 0.0]
