"""Training every weight: from a base, from an adapter that is merged first, and what comes out as a start again."""

from __future__ import annotations

import pytest
import torch
from zoo import build_zoo_model

from align import sft
from align.config import LoraSettings
from align.errors import UsageError
from align.models.adapter_config import adapter_parameters
from align.models.adapters import load_models, start_policy
from align.models.loading import Precision
from align.registry import open_registry
from align.training.command import main

FP32 = Precision(bf16=False)
IDS = torch.tensor([[5, 9, 30, 7, 80, 41]])


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def _sft(root, *words):
    fast = ["max_steps=3", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=4", "learning_rate=1e-3"]
    return main(sft.STAGE, ["--registry", str(root), "bf16=false", "max_length=128", *fast, *map(str, words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base, demonstrations):
    """A registry with an adapter, a base trained in full, and an adapter on top of that base."""
    root = tmp_path_factory.mktemp("full")
    data = f"data={demonstrations}"
    assert _sft(root, f"model={tiny_base}", data, "name=adapter", "lora.r=4", "learning_rate=1e-2") == 0
    assert _sft(root, "model=adapter", data, "name=whole", "lora=none") == 0
    assert _sft(root, "model=whole", data, "name=again", "lora.r=4") == 0
    return open_registry(root)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_every_weight_trains_in_single_precision(registry, tmp_path, architecture):
    base = registry.resolve(str(build_zoo_model(architecture, tmp_path / architecture)))

    model = start_policy(registry, base, None, Precision(bf16=True)).model

    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_adapter_is_merged_and_goes_on_in_the_weights(trained, capsys):
    checkpoint = trained.resolve("adapter")
    adapted = _logits(load_models(trained, ["adapter"], FP32).model)

    whole = start_policy(trained, checkpoint, None, FP32).model

    assert "its adapter is merged into the weights" in capsys.readouterr().out
    assert not any("lora" in key for key, _ in whole.named_parameters())
    assert torch.allclose(_logits(whole), adapted, atol=1e-5)
    assert all(parameter.requires_grad for parameter in whole.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_rounded_weights_are_not_trained(registry, tiny_base, quantization):
    with pytest.raises(UsageError, match=f"lora=none with quantization={quantization}"):
        start_policy(registry, registry.resolve(str(tiny_base)), None, Precision(quantization))


def test_what_was_trained_in_full_is_registered_as_a_base(trained):
    whole = trained.resolve("whole")

    assert (whole.kind, whole.is_adapter) == ("base", False)
    assert [parent["reference"] for parent in whole.manifest["parents"]] == ["adapter@v1"]
    assert trained.verify("whole") == []


def test_a_base_trained_in_full_carries_an_adapter_like_any_other(trained):
    again = trained.resolve("again")
    assert again.manifest["base"]["reference"] == "whole@v1"

    loaded = load_models(trained, ["again", "whole"], FP32)

    with torch.no_grad():
        adapted = loaded.model.eval()(input_ids=IDS).logits
        with loaded.model.disable_adapter():
            bare = loaded.model(input_ids=IDS).logits
    assert not torch.equal(adapted, bare)
    assert torch.equal(bare, _logits(load_models(trained, ["whole"], FP32).model))


def test_an_adapter_on_a_base_trained_in_full_is_continued(trained):
    loaded = start_policy(trained, trained.resolve("again"), LoraSettings(), FP32)

    assert loaded.base.reference == "whole@v1"
    assert all(parameter.requires_grad for parameter in adapter_parameters(loaded.model, "default"))
