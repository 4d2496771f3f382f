"""Fused layers: the numbers and gradients of the libraries' own, less kept for the backward pass, or the stock way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from zoo import build_zoo_model

from align.models.fused_layers import Switch, fuse_layers
from align.models.loading import checkpoint_activations

IDS = torch.arange(5, 53).reshape(2, 24)


def adapted(base: Path, dtype: torch.dtype = torch.float32, **settings: object):
    """A model with a LoRA that has learned something, its layers fused, and their switch."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).requires_grad_(False)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)
    model = get_peft_model(model, config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    return model, fuse_layers(model.get_base_model())


def step(model, switch: Switch, *, fused: bool, bf16: bool = False) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    """Loss, all gradients as one vector, and the kinds of autograd's steps."""
    switch.on = fused
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss.detach(), torch.cat(gradients), {type(node).__name__ for node in nodes_of(loss.grad_fn)}


def nodes_of(node, seen: set | None = None) -> set:
    seen = set() if seen is None else seen
    if node is not None and node not in seen:
        seen.add(node)
        for following, _ in node.next_functions:
            nodes_of(following, seen)
    return seen


def assert_equal_steps(model, switch: Switch, **options: bool) -> set[str]:
    (loss, gradients, _), (own_loss, own_gradients, nodes) = (
        step(model, switch, fused=fused, **options) for fused in (False, True)
    )
    assert torch.allclose(own_loss, loss, rtol=1e-5)
    assert float((own_gradients - gradients).norm() / gradients.norm()) < 1e-5
    return nodes


MLP, LORA, NORM = "_GatedMlpBackward", "_LoraProductBackward", "_RmsNormBackward"


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", {MLP, LORA, NORM}),
        ("qwen2", {MLP, LORA, NORM}),  # biases on the attention's layers
        ("qwen3", {MLP, LORA, NORM}),  # norms over single heads
        ("mistral", {MLP, LORA, NORM}),
        ("phi3", {LORA, NORM}),
        ("gemma3_text", {LORA}),  # its norm adds one to the weights, its MLP has another activation
        ("gpt2", set()),
    ],
)
def test_losses_and_gradients_are_those_of_the_libraries(tmp_path, family, kinds):
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model, switch = adapted(build_zoo_model(family, tmp_path, **without_dropout), fan_in_fan_out=family == "gpt2")

    nodes = assert_equal_steps(model, switch)

    assert nodes & {MLP, LORA, NORM} == kinds


def test_in_bfloat16_they_differ_by_rounding(tmp_path):
    model, switch = adapted(build_zoo_model("llama", tmp_path), torch.bfloat16)
    exact, exact_switch = adapted(build_zoo_model("llama", tmp_path))

    _, true, _ = step(exact, exact_switch, fused=False)
    (_, stock, _), (_, own, nodes) = (step(model, switch, fused=fused, bf16=True) for fused in (False, True))

    assert {MLP, LORA, NORM} <= nodes
    assert float((own - true).norm()) < 1.2 * float((stock - true).norm())


def test_less_is_kept_for_the_backward_pass(tmp_path):
    model, switch = adapted(build_zoo_model("llama", tmp_path, hidden_size=64, intermediate_size=172))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}
    for switch.on in (False, True):
        saved: dict[int, int] = {}

        def keep(tensor, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state
        kept[switch.on] = sum(saved.values())
        del hidden

    assert kept[True] < 0.75 * kept[False]


def test_activations_are_computed_again_under_checkpointing(tmp_path):
    model, switch = adapted(build_zoo_model("llama", tmp_path))
    checkpoint_activations(model.get_base_model())
    model.get_base_model().enable_input_require_grads()

    assert_equal_steps(model, switch)


def test_without_adapters_and_with_a_frozen_one(tmp_path):
    model, switch = adapted(build_zoo_model("llama", tmp_path))
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))

    def hidden() -> torch.Tensor:
        return model.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state

    found = {}
    for switch.on in (False, True):
        with model.disable_adapter():
            bare = hidden()
        model.set_adapter("other", inference_mode=True)
        found[switch.on] = bare, hidden()
        model.set_adapter("default")
    assert all(torch.allclose(own, stock, atol=1e-5) for own, stock in zip(found[True], found[False], strict=True))
    assert not torch.allclose(*found[True], atol=1e-2)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"lora_dropout": 0.5}), ("llama", {"use_dora": True}), ("phi", {"lora_bias": True})],
)
def test_layers_that_do_more_take_the_stock_way(tmp_path, family, settings):
    model, switch = adapted(build_zoo_model(family, tmp_path), **settings)
    losses = []
    for fused in (False, True):
        torch.manual_seed(1)
        loss, _, nodes = step(model, switch, fused=fused)
        losses.append(loss)

    assert not nodes & {MLP, LORA}
    assert torch.allclose(*losses, rtol=1e-5)


def test_rows_through_other_adapters_take_the_stock_way(tmp_path):
    model, switch = adapted(build_zoo_model("llama", tmp_path))
    model.eval()
    logits = []
    for switch.on in (False, True):
        with torch.no_grad():
            logits.append(model(input_ids=IDS, use_cache=False, adapter_names=["__base__", "default"]).logits)

    assert torch.allclose(*logits, atol=1e-5)
    assert not torch.allclose(logits[1], model(input_ids=IDS, use_cache=False).logits, atol=1e-2)


def test_weights_that_learn_take_the_stock_way(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build_zoo_model("llama", tmp_path))
    nodes = assert_equal_steps(model, fuse_layers(model))

    assert not nodes & {MLP, LORA, NORM}
