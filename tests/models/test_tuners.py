"""Every tuner of PEFT and every start of LoRA: trained, registered, loaded again, continued and asked for an answer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from zoo import build_zoo_model

from align import dpo, generate, kto, pretrain, reward, sft
from align.models.adapters import load_models
from align.models.heads import load_scorer
from align.models.loading import Precision
from align.registry import open_registry
from align.registry.__main__ import main as registry_main
from align.training.command import main
from align.tuners import find_obstacle, trainable_tuners

FP32 = Precision(bf16=False)
IDS = torch.tensor([[5, 9, 30, 7, 80, 41]])

SETTINGS = {
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 3},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 64},
    "MISS": {"r": 4},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 9, 30]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2, "r": 2},
    "WAVEFT": {"n_frequency": 32},
}
"""what a tiny model needs; everything else is PEFT's default"""

STARTS = {
    "gaussian": {},
    "orthogonal": {},
    "mica": {},
    "false": {"init_lora_weights": False},
    "eva": {},
    "olora": {},
    "pissa": {},
    "pissa_niter_4": {},
    "corda": {},
    "lora_ga": {},
    "rslora-pissa": {"init_lora_weights": "pissa", "use_rslora": True},
}

CASES = {name: {"peft_type": name, **SETTINGS.get(name, {})} for name in trainable_tuners()} | {
    start: {"peft_type": "LORA", "r": 4, "init_lora_weights": start, **settings} for start, settings in STARTS.items()
}
FAST = {"OFT", "IA3", "VERA", "eva", "pissa"}
TABLE = [pytest.param(name, id=name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]


@pytest.fixture
def seen(monkeypatch, no_pictures):
    """What training was given and what it made of it, of the last stage that was run."""
    from align.training import loop

    seen, plain = {}, loop.train

    def train(run, trainer):
        before = {key: (value.detach().clone(), value.requires_grad) for key, value in trainer.model.named_parameters()}
        numbers = plain(run, trainer)
        after = dict(trainer.model.named_parameters())
        moved = {key for key, (value, _) in before.items() if key in after and not after[key].equal(value)}
        trained = {key for key, (_, trains) in before.items() if trains}
        seen.update(model=trainer.model, moved=moved, trained=trained, logits=logits(trainer.model))
        return numbers

    monkeypatch.setattr(loop, "train", train)
    return seen


def logits(model):
    training = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=IDS, use_cache=False).logits
    model.train(training)
    return found


def run(stage, root, model, data, name, settings, *words):
    fast = ["max_steps=3", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=4", "learning_rate=1e-2"]
    asked = [f"peft={json.dumps(settings)}"] if settings else []
    words = [f"model={model}", f"data={data}", f"name={name}", "bf16=false", "max_length=128", *asked, *fast, *words]
    return main(stage, ["--registry", str(root), *words])


@pytest.mark.parametrize("case", TABLE)
def test_what_is_trained_is_what_is_loaded_again(case, tmp_path, tiny_base, demonstrations, seen, capsys):
    settings = CASES[case]
    # TRL has no place for an adapter on a head that is tied to the embeddings.
    tiny_base = build_zoo_model("llama", tmp_path / "untied") if case == "TRAINABLE_TOKENS" else tiny_base

    assert run(sft.STAGE, tmp_path, tiny_base, demonstrations, "policy", settings) == 0, capsys.readouterr().err

    assert seen["moved"] == seen["trained"], sorted(seen["trained"] ^ seen["moved"])[:4]
    registry = open_registry(tmp_path)
    loaded = load_models(registry, ["policy", str(tiny_base)], FP32)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen["logits"], logits(load_models(registry, [str(tiny_base)], FP32).model), atol=1e-4)
    assert registry_main(["--registry", str(tmp_path), "verify"]) == 0
    capsys.readouterr()
    assert generate.main(["policy", "eggs?", "--registry", str(tmp_path), "--max-new-tokens", "4"]) == 0

    continued = run(sft.STAGE, tmp_path, "policy", demonstrations, "further", {})

    if find_obstacle(settings["peft_type"], "continue"):
        assert continued == 4
    else:
        assert continued == 0, capsys.readouterr().err
        assert seen["moved"] == seen["trained"]


def _lines(capsys, start):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]


def _table(ability, fast):
    able = [name for name, settings in CASES.items() if not find_obstacle(settings["peft_type"], ability)]
    return [pytest.param(name, id=name, marks=[] if name in fast else pytest.mark.slow) for name in able]


@pytest.mark.parametrize("case", _table("copy", {"OFT", "C3A", "pissa"}))
def test_dpo_starts_at_its_reference_and_moves_the_adapter(case, tmp_path, tiny_base, preferences, seen, capsys):
    assert run(dpo.STAGE, tmp_path, tiny_base, preferences, "policy", CASES[case]) == 0, capsys.readouterr().err

    (first,) = _lines(capsys, "step 1 as expected")
    assert f"loss {math.log(2):.6g} " in first
    assert seen["moved"] == seen["trained"]
    loaded = load_models(open_registry(tmp_path), ["policy"], FP32)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", _table("copy", set()))
def test_kto_starts_at_its_reference_and_moves_the_adapter(case, tmp_path, tiny_base, preferences, seen, capsys):
    assert run(kto.STAGE, tmp_path, tiny_base, preferences, "policy", CASES[case]) == 0, capsys.readouterr().err

    (first,) = _lines(capsys, "step 1 as expected")
    assert "kl 0" in first or "kl -0" in first or "e-" in first
    assert seen["moved"] == seen["trained"]
    loaded = load_models(open_registry(tmp_path), ["policy"], FP32)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", ["true", "false"])
@pytest.mark.parametrize("case", ["OFT", "VERA", "UNILORA"])
def test_dpo_continues_an_adapter_against_a_frozen_copy_of_it(
    case, cached, tmp_path, tiny_base, demonstrations, preferences, seen, capsys
):
    assert run(sft.STAGE, tmp_path, tiny_base, demonstrations, "start", CASES[case]) == 0
    start = seen["logits"]
    capsys.readouterr()

    words = [f"cache_reference={cached}"]
    assert run(dpo.STAGE, tmp_path, "start", preferences, "policy", {}, *words) == 0, capsys.readouterr().err

    (first,) = _lines(capsys, "step 1 as expected")
    assert f"loss {math.log(2):.6g} " in first
    assert seen["moved"] == seen["trained"]
    assert not torch.allclose(seen["logits"], start, atol=1e-4)


@pytest.mark.parametrize("case", _table("score", {"OFT", "pissa"}))
def test_a_reward_model_scores_as_it_did_when_it_was_trained(case, tmp_path, tiny_base, preferences, seen, capsys):
    settings = CASES[case]
    if settings.get("init_lora_weights") == "lora_ga":
        assert run(reward.STAGE, tmp_path, tiny_base, preferences, "judge", settings) == 2
        assert "LoRA-GA" in capsys.readouterr().err
        return

    assert run(reward.STAGE, tmp_path, tiny_base, preferences, "judge", settings) == 0, capsys.readouterr().err

    assert seen["moved"] == seen["trained"]
    assert any("score" in key for key in seen["moved"])
    registry = open_registry(tmp_path)
    judge = load_scorer(registry, registry.resolve("judge"), FP32).model
    torch.testing.assert_close(logits(judge), seen["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow) for name in ("OFT", "eva", "corda")])
def test_pretraining_continues_a_base_under_any_adapter(case, tmp_path, tiny_base, demonstrations, seen, capsys):
    words = ["block_size=32"]
    assert run(pretrain.STAGE, tmp_path, tiny_base, demonstrations, "further", CASES[case], *words) == 0

    assert seen["moved"] == seen["trained"]
    loaded = load_models(open_registry(tmp_path), ["further"], FP32)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)


def test_loftq_makes_up_for_the_rounding_of_its_base(tmp_path, tiny_base, demonstrations, preferences, seen, capsys):
    settings = {"peft_type": "LORA", "r": 4, "init_lora_weights": "loftq"}
    nf4 = ["quantization=nf4"]

    assert run(sft.STAGE, tmp_path, tiny_base, demonstrations, "policy", settings, *nf4) == 0, capsys.readouterr().err
    loaded = load_models(open_registry(tmp_path), ["policy"], Precision("nf4", bf16=False))

    assert seen["moved"] == seen["trained"]
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-4)
    assert run(dpo.STAGE, tmp_path, tiny_base, preferences, "dpo", settings, *nf4) == 0, capsys.readouterr().err
