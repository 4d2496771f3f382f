"""Adapters trained here do in plain PEFT what PEFT expects of its own: load, save, switch, add up, merge and unload.

Nothing of `align` takes part after an adapter is registered. Adapters that PEFT made are in test_peft_kinds.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from zoo import build_zoo_model

from align import dpo, ppo, reward, sft
from align.registry import Registry, open_registry
from align.registry.__main__ import main as registry_main
from align.training.command import main

IDS = torch.tensor([[30, 40, 50, 60, 70, 80, 90, 100]])
WEIGHTS = "adapter_model.safetensors"
FIXED = [
    "max_steps=2", "save_steps=0", "logging_steps=1", "per_device_train_batch_size=4", "learning_rate=1e-2",
    "warmup_ratio=0", "max_length=96", "bf16=false",
]  # fmt: skip
TRAINED = {
    "plain": ["lora.r=4", "lora.dropout=0.2"],
    "dora": ["lora.r=4", "lora.use_dora=true"],
    "rslora": ["lora.r=4", "lora.use_rslora=true", "lora.target_modules=[q_proj,down_proj]"],
    "patterns": [
        "peft={peft_type: LORA, r: 4, lora_alpha: 8, target_modules: [q_proj, up_proj], "
        "rank_pattern: {q_proj: 2}, alpha_pattern: {up_proj: 3}}"
    ],
    "copies": ["peft={peft_type: LORA, r: 2, target_modules: [q_proj], modules_to_save: [lm_head]}"],
}
POLICIES = [*TRAINED, "stacked", "tuned", "imported"]

pytestmark = pytest.mark.usefixtures("no_pictures")


def _run(stage, root: Path, name: str, model: object, data: Path, *words: str) -> None:
    given = ["--registry", str(root), f"name={name}", f"model={model}", f"data={data}", *FIXED, *words]
    assert main(stage, given) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_zoo_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory, base, demonstrations, preferences) -> Registry:
    """An adapter of every stage and shape, trained by the commands."""
    root = tmp_path_factory.mktemp("registry")
    for name, words in TRAINED.items():
        _run(sft.STAGE, root, name, base, demonstrations, *words)
    _run(dpo.STAGE, root, "stacked", "plain", preferences, "adapter=stack", "lora.r=2", "lora.target_modules=[o_proj]")
    scored = ["rewards=[{name: length, args: {target: 8}}]", "rollout_batch_size=4", "sampling.max_new_tokens=4"]
    _run(ppo.STAGE, root, "tuned", "plain", preferences, *scored)
    _run(reward.STAGE, root, "judge", base, preferences, "lora.r=4")
    archive, words = root / "plain.tar", ["--registry", str(root)]
    assert registry_main(["export", "plain", str(archive), *words]) == 0
    assert registry_main(["import", str(archive), "--name", "imported", *words]) == 0
    return open_registry(root)


def _folder(registry: Registry, name: str) -> Path:
    return Path(registry.resolve(name).location)


def _bare(base: Path, **more: object):
    return AutoModelForCausalLM.from_pretrained(base, **({"dtype": torch.float32} | more)).eval()


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def _load(model, folder: Path, **more: object) -> PeftModel:
    """PEFT only warns about tensors that are missing or left over: here that is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, folder, **more)


@pytest.mark.parametrize("name", POLICIES)
def test_what_plain_peft_loads_and_saves_again_is_what_is_registered(registry, base, tmp_path, name):
    folder = _folder(registry, name)
    model = _load(_bare(base), folder)

    model.save_pretrained(tmp_path)

    again, saved = load_file(tmp_path / WEIGHTS), load_file(folder / WEIGHTS)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == PeftConfig.from_pretrained(folder).to_dict()
    assert torch.equal(_logits(_load(_bare(base), tmp_path)), _logits(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not [path for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


@pytest.mark.parametrize("name", POLICIES)
def test_disabled_and_unloaded_it_is_the_base_and_merged_it_is_the_sum(registry, base, name):
    bare, model = _logits(_bare(base)), _load(_bare(base), _folder(registry, name))
    tuned = _logits(model)

    with model.disable_adapter():
        off = _logits(model)
    on = _logits(model)
    unloaded = model.unload()

    assert torch.equal(off, bare)
    assert torch.equal(on, tuned)
    assert not torch.allclose(tuned, bare, atol=1e-4)
    if name != "copies":  # PEFT leaves trained copies of whole modules in place
        assert torch.equal(_logits(unloaded), bare)
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    merged = _load(_bare(base), _folder(registry, name)).merge_and_unload(safe_merge=True)
    assert torch.allclose(_logits(merged), tuned, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_its_state_goes_into_a_new_peft_model(registry, base, name):
    folder = _folder(registry, name)
    state = get_peft_model_state_dict(source := _load(_bare(base), folder))

    fresh = get_peft_model(_bare(base), PeftConfig.from_pretrained(folder))
    result = set_peft_model_state_dict(fresh, state)

    assert not result.unexpected_keys
    assert torch.equal(_logits(fresh), _logits(source))


@pytest.mark.parametrize("name", POLICIES)
def test_it_loads_in_other_types_and_without_memory_for_a_second_copy(registry, base, name):
    folder = _folder(registry, name)
    plain = _logits(_load(_bare(base), folder))

    lean = _load(_bare(base), folder, low_cpu_mem_usage=True)
    half = _load(_bare(base, dtype=torch.bfloat16), folder, autocast_adapter_dtype=False)

    assert {parameter.device.type for parameter in lean.parameters()} == {"cpu"}
    assert torch.equal(_logits(lean), plain)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert (_logits(half).float() - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("name", POLICIES)
def test_its_folder_alone_is_enough(registry, base, name):
    folder = _folder(registry, name)

    alone = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    assert torch.equal(_logits(alone), _logits(_load(_bare(base), folder)))
    tokenizer, of_base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    assert tokenizer.get_vocab() == of_base.get_vocab()
    assert tokenizer.chat_template == of_base.chat_template
    assert tokenizer.eos_token == of_base.eos_token


def test_a_reward_model_does_the_same_as_a_classifier(registry, base, tmp_path):
    folder = _folder(registry, "judge")

    def bare():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0).eval()

    model = _load(bare(), folder)
    scores = _logits(model)
    model.save_pretrained(tmp_path)

    saved = load_file(folder / WEIGHTS)
    assert any(key.endswith("score.weight") for key in saved)
    again = load_file(tmp_path / WEIGHTS)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)
    with model.disable_adapter():
        assert torch.equal(_logits(model), _logits(bare()))
    assert torch.allclose(_logits(model.merge_and_unload()), scores, atol=1e-5)
    alone = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    assert torch.equal(_logits(alone), scores)


def test_several_are_switched_added_up_mixed_in_a_batch_and_deleted(registry, base):
    names = ["plain", "tuned", "patterns"]
    apart = {name: _logits(_load(_bare(base), _folder(registry, name))) for name in names}
    bare, model = _logits(_bare(base)), _load(_bare(base), _folder(registry, "plain"), adapter_name="plain")
    for name in names[1:]:
        result = model.load_adapter(_folder(registry, name), adapter_name=name)
        assert not result.unexpected_keys
        assert not result.missing_keys

    for name in names:
        model.set_adapter(name)
        assert torch.equal(_logits(model), apart[name])
    with torch.no_grad():
        rows = model(input_ids=IDS.repeat(4, 1), adapter_names=[*names, "__base__"], use_cache=False).logits
    for row, alone in zip(rows, [*apart.values(), bare], strict=True):
        assert torch.allclose(row, alone[0], atol=1e-5)

    model.add_weighted_adapter(["plain", "tuned"], [1.0, 0.0], "first", combination_type="cat")
    model.add_weighted_adapter(["plain", "tuned"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("first")
    assert torch.allclose(_logits(model), apart["plain"], atol=1e-5)
    model.set_adapter("mean")
    assert not torch.allclose(_logits(model), bare, atol=1e-4)

    model.set_adapter("patterns")
    for name in ("plain", "tuned", "first", "mean"):
        model.delete_adapter(name)
    assert list(model.peft_config) == ["patterns"]
    assert torch.equal(_logits(model), apart["patterns"])


def test_a_merged_version_is_a_whole_model_for_plain_transformers(registry, base, tmp_path):
    tuned = _logits(_load(_bare(base), _folder(registry, "stacked")))

    assert registry_main(["merge", "stacked", "--out", str(tmp_path / "whole"), "--registry", str(registry.root)]) == 0

    assert torch.allclose(_logits(_bare(tmp_path / "whole")), tuned, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template
