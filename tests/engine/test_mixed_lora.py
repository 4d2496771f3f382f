"""Rows of several adapters in one batch: their deltas together are what PEFT gives each row by itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from align.engine.adapter_groups import BASE, MIXED, adapters_active, unwrap_peft
from align.models.decoding import CachedRows, Decoder

SIZE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
PROMPTS = torch.randint(3, 50, (5, 6), generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([7, 8, 9, 10, 11])


@pytest.fixture
def model():
    set_seed(0)
    config = {"init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZE)), LoraConfig(r=4, lora_alpha=8, **config), "red")
    model.add_adapter("blue", LoraConfig(r=6, lora_alpha=3, **config))
    model.add_adapter("green", LoraConfig(r=2, lora_alpha=9, **(config | {"target_modules": ["v_proj"]})))
    return model.eval()


def decode(model, adapters: list[str], group: str = MIXED) -> torch.Tensor:
    """The logits of the second token, which the layers computed with one token a row."""
    rows = len(adapters)
    decoder, cached = Decoder(unwrap_peft(model)), CachedRows(torch.ones(rows, 6, dtype=torch.long))
    with torch.inference_mode(), adapters_active(model, adapters, group):
        decoder.prefill(cached, PROMPTS[:rows], 0, 6)
        return decoder.step(cached, TOKENS[:rows])


def alone(model, adapters: list[str]) -> torch.Tensor:
    """The same logits, each row by its own adapter as PEFT computes it."""
    found = []
    for row, adapter in enumerate(adapters):
        ids = torch.cat([PROMPTS[row], TOKENS[row : row + 1]])[None]
        with torch.inference_mode(), adapters_active(model, [adapter], adapter):
            found.append(unwrap_peft(model)(input_ids=ids).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize(
    "adapters",
    [
        ["red", "blue", BASE, "green", "red"],
        ["blue"] * 3,
        ["green", BASE],
        [BASE, BASE],
        ["green", "red", "blue", "blue"],
    ],
    ids="-".join,
)
def test_every_row_gets_its_own_adapter_and_no_other(model, adapters):
    # Twice, because what was joined for other rows is used again where it covers these.
    for rows in (["red", "blue", "green"], adapters, adapters):
        torch.testing.assert_close(decode(model, rows), alone(model, rows), rtol=1e-5, atol=1e-6)


def test_infinite_numbers_of_one_adapter_stay_in_its_own_rows(model):
    for key, value in model.named_parameters():
        if "lora_A.blue" in key:
            value.data.fill_(torch.inf)

    logits = decode(model, ["red", "blue", "red"])

    assert not logits[1].isfinite().all()
    expected = alone(model, ["red", "red", "red"])
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-6)


def test_weights_that_were_trained_on_are_read_again(model):
    before = decode(model, ["red", "blue"])
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B.blue" in key:
                value.mul_(2)

    after = decode(model, ["red", "blue"])

    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after, alone(model, ["red", "blue"]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[1], after[1])


def test_the_model_is_as_before_afterwards(model):
    with pytest.raises(RuntimeError, match="stop"), adapters_active(model, ["red", "blue"], MIXED):
        raise RuntimeError("stop")

    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(decode(model, ["blue"], "blue"), alone(model, ["blue"]), rtol=1e-5, atol=1e-6)
