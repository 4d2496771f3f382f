from __future__ import annotations

import pytest
import torch

from align.config import LoraSettings
from align.errors import IntegrityError
from align.models.adapter_config import adapter_parameters
from align.models.adapters import start_policy
from align.models.loading import Precision, load_base
from align.models.tokenizers import load_tokenizer

IDS = torch.arange(3, 51).reshape(2, 24)


def test_a_base_is_loaded_frozen_in_the_precision_asked_for(registry, tiny_base):
    base = registry.resolve(str(tiny_base))

    single, half = load_base(base, Precision(bf16=False)), load_base(base, Precision(bf16=True))

    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in single.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_keeps_training_after_an_evaluation(registry, tiny_base, quantization):
    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    checkpoint = registry.resolve(str(tiny_base))
    model = start_policy(registry, checkpoint, LoraSettings(r=4), Precision(quantization, bf16=False)).model
    with torch.no_grad():
        model.eval()(input_ids=IDS, labels=IDS)

    model.train()(input_ids=IDS, labels=IDS).loss.backward()

    down = [p.grad for key, p in model.named_parameters() if "lora_B" in key]
    assert all(gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in down)
    assert any(module for module in model.modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt"))


def test_a_quantized_base_still_learns_after_an_evaluation(registry, tiny_base):
    pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    checkpoint = registry.resolve(str(tiny_base))
    torch.manual_seed(0)  # where the adapter starts decides how far twelve steps lead
    model = start_policy(registry, checkpoint, LoraSettings(r=4), Precision("nf4", bf16=False)).model
    optimizer = torch.optim.AdamW(adapter_parameters(model, "default"), lr=2e-2)
    losses = []
    for _ in range(12):
        with torch.no_grad():
            losses.append(model.eval()(input_ids=IDS, labels=IDS).loss.item())
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert losses[-1] < losses[0] - 0.1
    assert losses[6] < losses[0]


def test_a_folder_without_weights_is_refused_with_its_path(registry, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')

    with pytest.raises(IntegrityError, match=str(tmp_path)):
        load_base(registry.resolve(str(tmp_path)), Precision(bf16=False))


def test_truncated_weights_are_refused(registry, tiny_base, tmp_path):
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(tiny_base, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    with pytest.raises(IntegrityError, match=r"model\.safetensors: .* announces"):
        load_base(registry.resolve(str(folder)), Precision(bf16=False))


def test_a_tokenizer_without_pad_or_template_gets_both_and_says_so(registry, tmp_path):
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = None, None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    told: list[str] = []

    loaded = load_tokenizer(registry.resolve(str(tmp_path)), told.append)

    assert loaded.pad_token == "<|pad|>"
    chat = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "User: hi<|im_end|>\nAssistant: "
    assert len(told) == 2


def test_a_tokenizer_without_eos_is_refused(registry, tmp_path):
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')

    with pytest.raises(IntegrityError, match="no EOS token"):
        load_tokenizer(registry.resolve(str(tmp_path)))


def test_a_hub_model_that_cannot_be_had_points_at_the_name_and_the_network(registry):
    with pytest.raises(IntegrityError, match=r"nobody/nothing: no tokenizer .*; check the name and the network"):
        load_tokenizer(registry.resolve("nobody/nothing"))
