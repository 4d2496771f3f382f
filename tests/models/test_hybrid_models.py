"""Hybrid models and mixtures of experts: which modules a new adapter is set on, and whether rows can be packed."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import ARCHITECTURES, EXPERTS, HYBRIDS, build_zoo_model

from align import sft
from align.config import LoraSettings
from align.errors import UsageError
from align.models.adapter_config import has_fused_experts, insert_adapter, new_config
from align.registry import open_registry
from align.training.command import main
from align.training.training_data import carries_state, prove_packing

OUT_OF_REACH = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""architectures in which PEFT refuses to adapt `out_proj`"""


def shapes_of(architecture):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **(ARCHITECTURES | HYBRIDS | EXPERTS)[architecture])
        )


def adapted(model):
    """The paths of the modules with a LoRA on them."""
    return {
        path.split(".lora_A")[0].removeprefix("base_model.model.")
        for path, _ in model.named_parameters()
        if ".lora_A" in path
    }


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_all_linear_on_a_hybrid_model_is_pefts(architecture):
    model = shapes_of(architecture)
    head = model.get_output_embeddings()
    linear = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head}

    assert not has_fused_experts(model)
    found = adapted(insert_adapter(model, new_config(model, LoraSettings(r=2)), "default"))

    if architecture in OUT_OF_REACH:
        assert found == {path for path in linear if not path.endswith("out_proj")}
    else:
        plain = get_peft_model(
            shapes_of(architecture), LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
        )
        assert found == adapted(plain) == linear


@pytest.mark.parametrize("architecture", EXPERTS)
def test_all_linear_leaves_experts_and_routers_of_a_mixture_alone(architecture):
    model = shapes_of(architecture)

    assert has_fused_experts(model)
    found = adapted(insert_adapter(model, new_config(model, LoraSettings(r=2)), "default"))

    assert any("attn" in path or "attention" in path for path in found)
    assert not [path for path in found if ".experts" in path or "router" in path or path.endswith(".gate")]


@pytest.mark.parametrize("architecture", ["qwen2_moe", "jamba", "granitemoehybrid", "lfm2_moe", "llama4_text"])
def test_dense_layers_of_a_mixture_are_adapted_where_peft_does_not_take_them_for_experts(architecture):
    model = shapes_of(architecture)

    found = adapted(insert_adapter(model, new_config(model, LoraSettings(r=2)), "default"))

    assert any("feed_forward." in path or "mlp." in path for path in found)


@pytest.mark.parametrize("architecture", [*HYBRIDS, "qwen3_next", "jamba", "granitemoehybrid", "lfm2_moe"])
def test_packing_is_refused_for_a_model_that_carries_a_state(architecture):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(HYBRIDS | EXPERTS)[architecture])
    model = AutoModelForCausalLM.from_config(config)

    assert carries_state(model)
    with pytest.raises(UsageError, match=r"packing: .*; give packing=false"):
        prove_packing(model, tiny_tokenizer())


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe", "granitemoe"])
def test_a_model_of_attention_alone_carries_no_state(architecture):
    assert not carries_state(shapes_of(architecture))


def test_packing_a_hybrid_model_ends_with_2_and_without_packing_its_mlp_is_trained(tmp_path, demonstrations, capsys):
    base, root = build_zoo_model("lfm2", tmp_path / "base"), tmp_path / "registry"
    words = [f"model={base}", f"data={demonstrations}", "name=sft", "lora.r=2", "max_steps=2", "save_steps=0"]
    words = ["--registry", str(root), "bf16=false", "max_length=128", *words]

    assert main(sft.STAGE, [*words, "packing=true"]) == 2
    assert "packing: lfm2 does not take packed rows" in capsys.readouterr().err
    assert main(sft.STAGE, words) == 0

    state = load_file(open_registry(root).resolve("sft").location + "/adapter_model.safetensors")
    assert any("feed_forward.w1" in key for key in state)
