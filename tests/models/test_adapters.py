from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from zoo import score_last_token

from align.config import LoraSettings
from align.errors import IntegrityError, UsageError
from align.models.adapter_config import adapter_parameters, set_trainable
from align.models.adapters import (
    BASE,
    attach_adapter,
    copy_adapter,
    digests_of_base,
    load_models,
    prove_frozen_copy,
    save_adapter,
    start_policy,
)
from align.models.heads import load_score_head, start_reward
from align.models.loading import Precision

LORA = LoraSettings(r=4, alpha=8)
FP32 = Precision(bf16=False)
IDS = torch.tensor([[5, 9, 30, 7, 80, 41]])


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _shake(model, name="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _register(registry, loaded, name, kind="policy", parents=(), trained_over=None):
    with registry.stage(name) as staging:
        save_adapter(loaded.model, "default", staging.path, trained_over or loaded.base.location)
        loaded.tokenizer.save_pretrained(staging.path)
        return staging.commit(
            {
                "stage": "sft",
                "kind": kind,
                "parents": list(parents),
                "base": {
                    "reference": loaded.base.reference,
                    "location": loaded.base.location,
                    "digests": digests_of_base(loaded.base),
                },
                "template_digest": None,
                "data": [],
                "metrics": {},
                "versions": {},
            }
        )


@pytest.fixture
def policy(registry, tiny_base):
    loaded = start_policy(registry, registry.resolve(str(tiny_base)), LORA, FP32)
    _shake(loaded.model)
    return loaded, _register(registry, loaded, "policy")


def test_an_adapter_whose_base_was_elsewhere_is_loaded_without_a_warning(registry, policy):
    loaded, _ = policy
    _register(registry, loaded, "travelled", trained_over="/another/machine/base")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached = load_models(registry, ["travelled"], FP32)

    assert torch.equal(_logits(attached.model), _logits(loaded.model))


def test_a_new_adapter_changes_nothing_before_training(registry, tiny_base):
    loaded = start_policy(registry, registry.resolve(str(tiny_base)), LORA, FP32)

    plain = AutoModelForCausalLM.from_pretrained(tiny_base)

    assert torch.equal(_logits(loaded.model.eval()), _logits(plain))


def test_only_the_adapter_trains(registry, tiny_base):
    model = start_policy(registry, registry.resolve(str(tiny_base)), LORA, FP32).model

    assert all(("lora_" in key) == value.requires_grad for key, value in model.named_parameters())


def test_a_registered_policy_loads_with_plain_peft_and_gives_the_same_logits(registry, tiny_base, policy):
    _, checkpoint = policy

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), checkpoint.location)
    ours = load_models(registry, ["policy"], FP32)

    assert torch.equal(_logits(plain), _logits(ours.model))


def test_continuing_an_adapter_starts_from_its_weights_and_trains_them(registry, policy):
    loaded, checkpoint = policy

    continued = start_policy(registry, checkpoint, LoraSettings(r=64), FP32)

    assert torch.equal(_logits(continued.model.eval()), _logits(loaded.model.eval()))
    assert all(parameter.requires_grad for parameter in adapter_parameters(continued.model, "default"))


def test_a_copied_adapter_is_equal_frozen_and_stays_when_the_source_moves(policy):
    loaded, _ = policy
    copy_adapter(loaded.model, "default", "ref")
    prove_frozen_copy(loaded.model, "default", "ref")
    before = _logits(loaded.model.eval())

    _shake(loaded.model, "default", seed=9)
    loaded.model.set_adapter("ref")

    assert torch.equal(_logits(loaded.model), before)
    with pytest.raises(IntegrityError, match="not a frozen copy"):
        prove_frozen_copy(loaded.model, "default", "ref")


def test_several_adapters_share_one_base(registry, tiny_base, policy):
    loaded, _ = policy
    _shake(loaded.model, seed=4)
    _register(registry, loaded, "other")

    several = load_models(registry, ["policy", "other", str(tiny_base)], FP32)

    base_size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_base).parameters())
    adapters = sum(p.numel() for key, p in several.model.named_parameters() if "lora_" in key)
    assert sum(p.numel() for p in several.model.parameters()) == base_size + adapters
    assert several.adapters == {"policy@v1": "adapter0", "other@v1": "adapter1", str(tiny_base): BASE}


def test_an_adapter_of_another_base_is_refused_with_both_digests(registry, policy, tmp_path):
    from tiny import build_tiny_qwen3

    _, checkpoint = policy
    other = registry.resolve(str(build_tiny_qwen3(tmp_path / "other", seed=7)))
    loaded = start_policy(registry, other, LORA, FP32)

    with pytest.raises(IntegrityError, match=r"weights is sha256:\w+, but .* has sha256:\w+"):
        attach_adapter(loaded, checkpoint, "second")


def _foreign_copy(checkpoint, folder: Path) -> Path:
    """The adapter as a bare folder, as somebody else's tool would have written it."""
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((Path(checkpoint.location) / name).read_bytes())
    return folder


def test_an_adapter_with_half_its_tensors_is_refused(registry, policy, tmp_path):
    folder = _foreign_copy(policy[1], tmp_path / "half")
    state = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(state.items())[: len(state) // 2]), folder / "adapter_model.safetensors")

    with pytest.raises(IntegrityError, match="adapter tensors do not fit"):
        load_models(registry, [str(folder)], FP32)


def test_an_adapter_that_changes_nothing_is_refused(registry, policy, tmp_path):
    folder = _foreign_copy(policy[1], tmp_path / "dead")
    state = load_file(folder / "adapter_model.safetensors")
    dead = {key: tensor * (0 if "lora_B" in key else 1) for key, tensor in state.items()}
    save_file(dead, folder / "adapter_model.safetensors")

    with pytest.raises(IntegrityError, match="changes nothing"):
        load_models(registry, [str(folder)], FP32)


def test_a_flipped_bit_in_a_registered_adapter_is_refused(registry, policy):
    path = Path(policy[1].location) / "adapter_model.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)

    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        load_models(registry, ["policy"], FP32)


def test_a_truncated_foreign_adapter_is_refused_by_path(registry, policy, tmp_path):
    folder = _foreign_copy(policy[1], tmp_path / "cut")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(IntegrityError, match=str(path)):
        load_models(registry, [str(folder)], FP32)


def test_unknown_target_modules_list_those_there_are(registry, tiny_base):
    lora = LoraSettings(target_modules=["q_projection"])

    with pytest.raises(UsageError, match="q_proj"):
        start_policy(registry, registry.resolve(str(tiny_base)), lora, FP32)


@pytest.fixture
def reward_model(registry, tiny_base):
    loaded = start_reward(registry, registry.resolve(str(tiny_base)), LORA, FP32)
    _shake(loaded.model)
    return loaded, _register(registry, loaded, "judge", kind="reward")


def test_a_score_head_survives_the_round_trip_through_plain_peft(reward_model, tiny_base):
    loaded, checkpoint = reward_model
    before = _logits(loaded.model.eval())

    body = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    body.config.pad_token_id = loaded.tokenizer.pad_token_id
    plain = PeftModel.from_pretrained(body, checkpoint.location)

    assert torch.equal(_logits(plain.eval()), before)


def test_a_reward_adapter_with_its_head_scores_alike_on_a_language_model_base(registry, tiny_base, reward_model):
    loaded, checkpoint = reward_model
    expected = _logits(loaded.model.eval()).squeeze(-1)
    policy = start_policy(registry, registry.resolve(str(tiny_base)), LORA, FP32)
    attach_adapter(policy, checkpoint, "reward")
    policy.model.set_adapter("reward")

    with torch.no_grad():
        hidden = policy.model.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state
        scores = score_last_token(hidden, torch.ones_like(IDS), load_score_head(checkpoint))

    assert torch.allclose(scores, expected, atol=1e-6)


def test_a_reward_model_started_from_a_policy_continues_its_adapter(registry, policy):
    loaded, checkpoint = policy

    reward = start_reward(registry, checkpoint, LORA, FP32)

    lora = {key: value for key, value in reward.model.named_parameters() if "lora_" in key}
    ours = {key: value for key, value in loaded.model.named_parameters() if "lora_" in key}
    assert lora.keys() == ours.keys()
    assert all(torch.equal(lora[key], ours[key]) for key in lora)
    assert all(value.requires_grad for value in lora.values())


def test_a_reward_model_given_as_policy_is_refused(registry, reward_model):
    with pytest.raises(UsageError, match="a reward model scores text"):
        start_policy(registry, registry.resolve("judge"), LORA, FP32)


def test_setting_one_adapter_trainable_leaves_the_others_alone(policy):
    model = policy[0].model
    copy_adapter(model, "default", "ref")

    set_trainable(model, "ref", True)
    set_trainable(model, "default", False)

    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "ref"))
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "default"))
