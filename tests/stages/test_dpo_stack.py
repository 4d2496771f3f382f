"""A fresh adapter trained beside a frozen one: what is registered is one adapter and exactly their sum."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align import dpo, sft
from align.models.adapter_config import set_trainable
from align.models.lora_starts import WHOLE, concatenate
from align.registry import open_registry
from align.training.command import main

FIXED = ["bf16=false", "learning_rate=5e-3", "logging_steps=1", "per_device_train_batch_size=4", "warmup_ratio=0"]
IDS = torch.arange(3, 40).reshape(1, -1)

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(stage, root: Path, *words: object) -> int:
    return main(stage, ["--registry", str(root), *FIXED, "max_steps=3", "save_steps=0", *map(str, words)])


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_base, demonstrations, preferences) -> Path:
    """A registry with `start` (SFT, rank 4 on all layers) and `stacked` (rank 2 on two modules beside it)."""
    root = tmp_path_factory.mktemp("stack")
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=start", "lora.r=4", "lora.alpha=12"]
    assert run(sft.STAGE, root, *words) == 0
    fresh = ["adapter=stack", "lora.r=2", "lora.alpha=5", "lora.target_modules=[q_proj,up_proj]"]
    assert run(dpo.STAGE, root, "model=start", f"data={preferences}", "name=stacked", *fresh) == 0
    return root


def folder(root: Path, name: str) -> Path:
    return Path(open_registry(root).resolve(name).location)


def base_of(tiny_base: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


SETTINGS = {
    "same modules": ({"r": 4, "lora_alpha": 7}, {"r": 3, "lora_alpha": 5}),
    "rslora on one side": ({"r": 4, "lora_alpha": 7, "use_rslora": True}, {"r": 2, "lora_alpha": 5}),
    "other modules": ({"r": 4, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["down_proj", "q_proj"]}),
    "patterns": (
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "target_modules": r".*layers\.1\.self_attn\.q_proj"},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_concatenated_adapter_gives_the_logits_of_the_two_active_together(tmp_path, tiny_base, name):
    common = {"target_modules": ["q_proj", "o_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    first, second = (LoraConfig(**common | settings) for settings in SETTINGS[name])
    model = get_peft_model(base_of(tiny_base), first, adapter_name="ref")
    model.add_adapter("default", second)
    model.base_model.set_adapter(["default", "ref"])
    both = logits(model)

    concatenate(model)
    model.save_pretrained(tmp_path, selected_adapters=[WHOLE])

    plain = logits(PeftModel.from_pretrained(base_of(tiny_base), tmp_path / WHOLE))
    assert (both - logits(base_of(tiny_base))).abs().max() > 1e-2
    assert (plain - both).abs().max() < 1e-5 * both.abs().max()
    config = json.loads((tmp_path / WHOLE / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})


def test_the_registered_adapter_holds_the_frozen_one_as_it_was_and_the_trained_one(root, tiny_base):
    start, stacked = (load_file(folder(root, name) / "adapter_model.safetensors") for name in ("start", "stacked"))

    for key, whole in stacked.items():
        assert whole.shape[0 if "lora_A" in key else 1] == 4 + 2
        if "lora_A" in key:
            assert torch.equal(whole[:4], start[key])
        else:
            assert torch.equal(whole[:, :4], start[key] * (12 / 4))
            assert bool(whole[:, 4:].any()) is ("q_proj" in key or "up_proj" in key)
    plain = PeftModel.from_pretrained(base_of(tiny_base), folder(root, "stacked"))
    before = PeftModel.from_pretrained(base_of(tiny_base), folder(root, "start"))
    assert (logits(plain) - logits(before)).abs().max() > 1e-4


def test_a_stacked_adapter_is_a_policy_like_any_other_and_is_continued(root, preferences, capsys):
    registry = open_registry(root)
    manifest = registry.resolve("stacked").manifest
    assert (manifest["kind"], manifest["parents"][0]["reference"]) == ("policy", "start@v1")
    assert registry.verify("stacked") == []

    assert run(dpo.STAGE, root, "model=stacked", f"data={preferences}", "name=again") == 0

    first = json.loads((folder(root, "again") / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-6)


def test_the_frozen_adapter_is_neither_trained_nor_left_when_trl_reads_its_reference(root, preferences, monkeypatch):
    seen = []
    monkeypatch.setattr("align.training.loop.train", lambda run, trainer: seen.append(trainer) or {})
    words = ["model=start", f"data={preferences}", "name=watched", "adapter=stack", "cache_reference=false"]
    assert run(dpo.STAGE, root, *words) == 0
    trainer, model = seen[0], seen[0].model

    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    loss.backward()

    assert loss.item() == pytest.approx(math.log(2), abs=5e-6)
    assert model.active_adapters == ["default", "ref"]
    trained = {key for key, value in model.named_parameters() if value.grad is not None}
    assert trained
    assert all(".default." in key for key in trained)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.use_dora=true"], "DoRA normalises base and update together"),
        (["model=base"], "is a base without an adapter"),
        (["weight_decay=0.1", "model=dora"], "DoRA normalises base and update together"),
    ],
)
def test_what_cannot_be_one_adapter_is_refused_with_code_2(
    root, tiny_base, demonstrations, preferences, capsys, words, message
):
    if "model=dora" in words:
        start = [f"model={tiny_base}", f"data={demonstrations}", "name=dora", "lora.use_dora=true", "lora.r=2"]
        assert run(sft.STAGE, root, *start) == 0
    words = [word.replace("model=base", f"model={tiny_base}") for word in words]

    assert run(dpo.STAGE, root, "model=start", f"data={preferences}", "name=no", "adapter=stack", *words) == 2

    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_stack_goes_on_after_an_interruption_to_the_same_bits(root, preferences, monkeypatch, cached):
    from align.training.checkpoints import Checkpoints

    words = ["model=start", f"data={preferences}", "adapter=stack", f"cache_reference={cached}", "max_steps=6"]
    words += ["save_steps=2", "lora.r=2"]
    assert run(dpo.STAGE, root, *words, f"name=whole-{cached}") == 0

    seal = Checkpoints.seal

    def cut(self, step, progress=None):
        seal(self, step, progress)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "seal", cut)
        assert run(dpo.STAGE, root, *words, f"name=cut-{cached}") == 130
    assert run(dpo.STAGE, root, *words, f"name=cut-{cached}", "--resume") == 0

    whole, cut_one = (load_file(folder(root, f"{n}-{cached}") / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut_one[key]) for key in whole)


def test_gradients_can_be_switched_off_for_one_of_two_adapters(tiny_base):
    model = get_peft_model(base_of(tiny_base), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="ref")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "ref"])

    set_trainable(model, "ref", False)

    moving = {key.split(".")[-2] for key, value in model.named_parameters() if value.requires_grad}
    assert moving == {"default"}


def test_its_plan_is_about_the_new_adapter_and_refuses_what_the_run_would(root, tiny_base, preferences, capsys):
    words = [f"data={preferences}", "name=plan", "adapter=stack", "lora.r=3", "lora.target_modules=[q_proj]"]

    assert run(dpo.STAGE, root, "model=start", *words, "--dry-run") == 0
    # Two layers of 32 to 32: A and B of rank 3 each.
    assert f"trainable  {2 * 3 * (32 + 32)} of " in capsys.readouterr().out

    assert run(dpo.STAGE, root, f"model={tiny_base}", *words, "--dry-run") == 2
    assert "is a base without an adapter" in capsys.readouterr().err
    assert run(dpo.STAGE, root, "model=start", *words, "lora.target_modules=[query]", "--dry-run") == 2
    assert "query asked; the model has no such module" in capsys.readouterr().err
