"""rsLoRA and DoRA: trained, saved, loaded by us and by plain PEFT, continued, copied and proved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import build_zoo_model

from align import dpo, ppo, sft
from align.config import LoraSettings
from align.errors import IntegrityError
from align.models.adapter_config import adapter_parameters
from align.models.adapters import copy_adapter, load_models, prove_frozen_copy, start_policy
from align.models.loading import Precision
from align.registry import open_registry
from align.training.command import main

FP32 = Precision(bf16=False)
IDS = torch.tensor([[5, 9, 30, 7, 80, 41]])
KINDS = {"rslora": "lora.use_rslora=true", "dora": "lora.use_dora=true"}
WEIGHTS = "adapter_model.safetensors"
OTHERS = LoraSettings(r=64)
"""settings of a new adapter, which a continued one does not take over"""


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def _run(stage, root, *words):
    fast = ["max_steps=3", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=4", "learning_rate=1e-2"]
    return main(stage, ["--registry", str(root), "bf16=false", "max_length=128", *fast, *map(str, words)])


@pytest.fixture(scope="module", params=[*KINDS, "dora-gpt2"])
def trained(request, tmp_path_factory, tiny_base, demonstrations):
    """A registry with a policy of one kind; DoRA also on the transposed layers of GPT-2."""
    folder = tmp_path_factory.mktemp(request.param)
    base = build_zoo_model("gpt2", folder / "base") if request.param.endswith("gpt2") else tiny_base
    kind = KINDS[request.param.removesuffix("-gpt2")]
    assert _run(sft.STAGE, folder, f"model={base}", f"data={demonstrations}", "name=policy", "lora.r=4", kind) == 0
    return open_registry(folder)


def test_what_was_trained_is_what_is_loaded_by_us_and_by_plain_peft(trained):
    checkpoint = trained.resolve("policy")
    base = AutoModelForCausalLM.from_pretrained(trained.resolve_base(checkpoint).location)
    bare = _logits(base)

    ours = _logits(load_models(trained, ["policy"], FP32).model)
    plain = _logits(PeftModel.from_pretrained(base, checkpoint.location))

    assert torch.equal(ours, plain)
    assert not torch.allclose(ours, bare, atol=1e-4)


def test_it_is_continued_from_where_it_was_and_a_copy_of_it_stays(trained):
    checkpoint = trained.resolve("policy")
    saved = _logits(load_models(trained, ["policy"], FP32).model)
    model = start_policy(trained, checkpoint, OTHERS, FP32).model
    assert torch.equal(_logits(model), saved)
    copy_adapter(model, "default", "ref")
    prove_frozen_copy(model, "default", "ref")

    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    moved = list(adapter_parameters(model, "default"))
    torch.optim.SGD(moved, lr=1.0).step()

    assert all(parameter.grad is not None and parameter.grad.any() for parameter in moved)
    assert not torch.equal(_logits(model), saved)
    model.set_adapter("ref")
    assert torch.equal(_logits(model), saved)
    with pytest.raises(IntegrityError, match="not a frozen copy"):
        prove_frozen_copy(model, "default", "ref")


def _foreign_copy(checkpoint, folder: Path) -> Path:
    folder.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (folder / name).write_bytes((Path(checkpoint.location) / name).read_bytes())
    return folder


def test_it_is_refused_when_one_tensor_is_missing(trained, tmp_path):
    folder = _foreign_copy(trained.resolve("policy"), tmp_path / "short")
    state = load_file(folder / WEIGHTS)
    dropped = max(state, key=lambda key: ("magnitude" in key, key))
    save_file({key: tensor for key, tensor in state.items() if key != dropped}, folder / WEIGHTS)

    with pytest.raises(IntegrityError, match=f"1 of {len(state)} adapter tensors do not fit its base, first {dropped}"):
        load_models(trained, [str(folder)], FP32)


def test_it_is_refused_when_it_changes_nothing(trained, tmp_path, tiny_base):
    folder = _foreign_copy(trained.resolve("policy"), tmp_path / "dead")
    fresh = start_policy(trained, trained.resolve("policy"), OTHERS, FP32)
    state = get_peft_model_state_dict(fresh.model)
    for key in state:
        if "lora_B" in key:
            state[key] = torch.zeros_like(state[key])
        if "magnitude" in key:
            state[key] = _norms(fresh.model, key)
    save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, folder / WEIGHTS)

    with pytest.raises(IntegrityError, match="changes nothing"):
        load_models(trained, [str(folder)], FP32)


def _norms(model, key: str) -> torch.Tensor:
    """The length of each output's weights in the frozen layer, with which DoRA begins."""
    layer = model.get_submodule(key.split(".lora_magnitude_vector")[0])
    weight = layer.base_layer.weight
    return torch.linalg.norm(weight.T if type(layer.base_layer).__name__ == "Conv1D" else weight, dim=1)


def test_a_dora_adapter_of_which_only_the_magnitudes_moved_is_alive(trained, tmp_path):
    folder = _foreign_copy(trained.resolve("policy"), tmp_path / "magnitudes")
    state = load_file(folder / WEIGHTS)
    if not any("magnitude" in key for key in state):
        pytest.skip("only DoRA has magnitudes")
    save_file({key: tensor * (0 if "lora_B" in key else 1) for key, tensor in state.items()}, folder / WEIGHTS)

    loaded = _logits(load_models(trained, [str(folder)], FP32).model)

    base = trained.resolve_base(trained.resolve("policy")).location
    assert not torch.equal(loaded, _logits(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.slow
def test_dpo_and_ppo_continue_it(trained, preferences, demonstrations):
    assert _run(dpo.STAGE, trained.root, "model=policy", f"data={preferences}", "name=dpo") == 0
    small = ["rollout_batch_size=4", "num_ppo_epochs=1", "sampling.max_new_tokens=5"]
    rewards = "rewards=[{name: length, args: {target: 8, unit: characters}}]"
    assert _run(ppo.STAGE, trained.root, "model=policy", f"data={demonstrations}", "name=ppo", *small, rewards) == 0

    kept = {name: set(load_file(Path(trained.resolve(name).location) / WEIGHTS)) for name in ("policy", "dpo", "ppo")}
    assert kept["policy"] == kept["dpo"] == kept["ppo"]
