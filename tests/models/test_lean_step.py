"""Steps in few operations: they answer as transformers' layers do, and step aside where they would not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from zoo import build_zoo_model

from align.models import decoding
from align.models.decoding import CachedRows, Decoder, pad_left
from align.models.fused_layers import fuse_layers
from align.models.lean_step import is_lean
from align.registry import open_registry

PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18]]


@pytest.fixture
def lean_steps(monkeypatch) -> list[int]:
    """How many rows each lean step had."""
    found: list[int] = []
    plain = decoding.lean_logits

    def noted(causal, cache, tokens, mask):
        found.append(len(tokens))
        return plain(causal, cache, tokens, mask)

    monkeypatch.setattr(decoding, "lean_logits", noted)
    return found


def build(kind: str, folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(build_zoo_model(kind, folder)).eval()


def decode(causal, prompts: list[list[int]], steps: int = 5) -> list[torch.Tensor]:
    """The logits of each step, of rows padded on the left."""
    decoder = Decoder(causal)
    ids, mask = pad_left(prompts, 0, "cpu")
    rows = CachedRows(mask)
    with torch.inference_mode():
        logits = [decoder.prefill(rows, ids, 0, ids.shape[1])[:, -1]]
        for _ in range(steps):
            logits.append(decoder.step(rows, logits[-1].argmax(dim=-1)))
    return logits


def check_against_whole_passes(causal, prompts: list[list[int]]) -> None:
    logits = decode(causal, prompts)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for of_step in logits:
            with torch.inference_mode():
                expected = causal(input_ids=torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(of_step[row], expected, rtol=1e-4, atol=1e-5)
            ids.append(int(of_step[row].argmax()))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "padded"])
def test_steps_are_those_of_the_whole_model(kind, prompts, tmp_path, lean_steps):
    causal = build(kind, tmp_path)

    check_against_whole_passes(causal, prompts)

    assert lean_steps[-5:] == [len(prompts)] * 5


def test_an_adapter_stays_on(tmp_path, lean_steps):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build("llama", tmp_path), config).eval()
    causal = model.get_base_model()
    with model.disable_adapter():
        bare = decode(causal, PROMPTS)

    check_against_whole_passes(causal, PROMPTS)

    assert len(lean_steps) >= 10
    assert not torch.allclose(bare[1], decode(causal, PROMPTS)[1], atol=1e-2)


def test_layers_that_rollouts_fuse_are_computed_here_too(tmp_path, lean_steps):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    causal = get_peft_model(build("llama", tmp_path), config).eval().get_base_model()
    before = decode(causal, PROMPTS)
    fuse_layers(causal)

    after = decode(causal, PROMPTS)

    assert lean_steps[-10:] == [3] * 10
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt2", "phi3"])
def test_other_layers_and_caches_are_left_to_transformers(kind, tmp_path, lean_steps):
    causal = build(kind, tmp_path)

    check_against_whole_passes(causal, PROMPTS[1:])  # mistral's window slides

    assert not lean_steps


def test_a_replaced_layer_a_hook_and_gradients_are_left_to_transformers(tmp_path, lean_steps):
    causal = build("llama", tmp_path)
    assert is_lean(causal)
    hook = causal.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)

    check_against_whole_passes(causal, PROMPTS)

    assert not is_lean(causal)
    hook.remove()
    causal.model.norm = torch.nn.LayerNorm(32)
    assert not is_lean(causal)
    check_against_whole_passes(causal, PROMPTS)
    assert not lean_steps


def test_a_model_that_answers_otherwise_is_decoded_by_transformers_and_says_so(tmp_path, capsys, lean_steps):
    causal = build("llama", tmp_path)
    plain = type(causal.model.layers[0].mlp).forward

    class LlamaMLP(type(causal.model.layers[0].mlp)):
        def forward(self, x):
            return plain(self, x) + x

    causal.model.layers[0].mlp.__class__ = LlamaMLP

    check_against_whole_passes(causal, PROMPTS)

    assert lean_steps == [2]  # the proof
    assert "decoded by transformers' layers, ours differ by" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_in_bfloat16_takes_them_too(smollm2_registry, lean_steps, capsys):
    folder = open_registry(smollm2_registry).resolve("smollm2").location
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    logits = decode(causal, PROMPTS)

    assert lean_steps[-5:] == [3] * 5
    assert "ours differ" not in capsys.readouterr().err
    exact = decode(causal.float(), PROMPTS)[0]
    assert (logits[0].float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("part", ["mask", "norm"])
def test_another_computation_is_found_in_bfloat16_as_in_float32(part, tmp_path, lean_steps, monkeypatch, capsys):
    causal = build("llama", tmp_path).bfloat16()
    plain = decoding.lean_logits

    def wrong(causal, cache, tokens, mask):
        with monkeypatch.context() as patch:
            if part == "norm":
                patch.setattr(causal.model.norm, "variance_epsilon", 10.0)
            return plain(causal, cache, tokens, mask if part == "norm" else mask[:, -1:])

    monkeypatch.setattr(decoding, "lean_logits", wrong)

    decode(causal, PROMPTS)

    assert "ours differ" in capsys.readouterr().err
