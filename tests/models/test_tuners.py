"""Every tuner of PEFT and every start of LoRA: trained, registered, loaded again, continued and asked for an answer."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from zoo import build_zoo_model

from align import dpo, generate, grpo, kto, ppo, pretrain, reward, sft
from align.errors import UsageError
from align.evaluation import model_runs
from align.models.adapters import load_models
from align.models.heads import load_scorer
from align.models.loading import Precision
from align.registry import open_registry
from align.registry.__main__ import main as registry_main
from align.training.command import main
from align.tuners import TUNERS, find_obstacle, trainable_tuners

FP32 = Precision(bf16=False)
IDS = torch.tensor([[5, 9, 71, 7, 80, 41]])

SETTINGS = {
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 3},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 64},
    "MISS": {"r": 4},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 71]},
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


def assert_only_the_adapter_moved(seen):
    # AdaLoRA may give a layer rank 0, whose singular values then are 0 as they were.
    still = {key for key in seen["trained"] - seen["moved"] if ".lora_E." not in key}
    assert not still
    assert seen["moved"] <= seen["trained"]


def run(stage, root, model, data, name, settings, *words):
    fast = ["max_steps=3", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=4", "learning_rate=1e-2"]
    asked = [f"peft={json.dumps(settings)}"] if settings else []
    words = [f"model={model}", f"data={data}", f"name={name}", "bf16=false", "max_length=128", *asked, *fast, *words]
    return main(stage, ["--registry", str(root), *words])


def test_the_table_names_every_tuner_of_peft():
    assert {tuner.value for tuner in PEFT_TYPE_TO_CONFIG_MAPPING} == set(TUNERS)


@pytest.mark.parametrize("case", TABLE)
def test_what_is_trained_is_what_is_loaded_again(case, tmp_path, tiny_base, demonstrations, seen, capsys):
    settings = CASES[case]
    # TRL has no place for an adapter on a head that is tied to the embeddings.
    tiny_base = build_zoo_model("llama", tmp_path / "untied") if case == "TRAINABLE_TOKENS" else tiny_base

    assert run(sft.STAGE, tmp_path, tiny_base, demonstrations, "policy", settings) == 0, capsys.readouterr().err

    assert_only_the_adapter_moved(seen)
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
        assert_only_the_adapter_moved(seen)


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
    assert_only_the_adapter_moved(seen)
    loaded = load_models(open_registry(tmp_path), ["policy"], FP32)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", _table("copy", set()))
def test_kto_starts_at_its_reference_and_moves_the_adapter(case, tmp_path, tiny_base, preferences, seen, capsys):
    assert run(kto.STAGE, tmp_path, tiny_base, preferences, "policy", CASES[case]) == 0, capsys.readouterr().err

    (first,) = _lines(capsys, "step 1 as expected")
    assert "kl 0" in first or "kl -0" in first or "e-" in first
    assert_only_the_adapter_moved(seen)
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
    assert_only_the_adapter_moved(seen)
    assert not torch.allclose(seen["logits"], start, atol=1e-4)


@pytest.mark.parametrize("case", _table("score", {"OFT", "pissa"}))
def test_a_reward_model_scores_as_it_did_when_it_was_trained(case, tmp_path, tiny_base, preferences, seen, capsys):
    settings = CASES[case]
    if settings.get("init_lora_weights") == "lora_ga":
        assert run(reward.STAGE, tmp_path, tiny_base, preferences, "judge", settings) == 2
        assert "LoRA-GA" in capsys.readouterr().err
        return

    assert run(reward.STAGE, tmp_path, tiny_base, preferences, "judge", settings) == 0, capsys.readouterr().err

    assert_only_the_adapter_moved(seen)
    assert any("score" in key for key in seen["moved"])
    registry = open_registry(tmp_path)
    judge = load_scorer(registry, registry.resolve("judge"), FP32).model
    torch.testing.assert_close(logits(judge), seen["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow) for name in ("OFT", "eva", "corda")])
def test_pretraining_continues_a_base_under_any_adapter(case, tmp_path, tiny_base, demonstrations, seen, capsys):
    words = ["block_size=32"]
    assert run(pretrain.STAGE, tmp_path, tiny_base, demonstrations, "further", CASES[case], *words) == 0

    assert_only_the_adapter_moved(seen)
    loaded = load_models(open_registry(tmp_path), ["further"], FP32)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-5)


def test_loftq_makes_up_for_the_rounding_of_its_base(tmp_path, tiny_base, demonstrations, preferences, seen, capsys):
    settings = {"peft_type": "LORA", "r": 4, "init_lora_weights": "loftq"}
    nf4 = ["quantization=nf4"]

    assert run(sft.STAGE, tmp_path, tiny_base, demonstrations, "policy", settings, *nf4) == 0, capsys.readouterr().err
    loaded = load_models(open_registry(tmp_path), ["policy"], Precision("nf4", bf16=False))

    assert_only_the_adapter_moved(seen)
    torch.testing.assert_close(logits(loaded.model), seen["logits"], rtol=1e-4, atol=1e-4)
    assert run(dpo.STAGE, tmp_path, tiny_base, preferences, "dpo", settings, *nf4) == 0, capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("case", [param for param in TABLE if CASES[param.id]["peft_type"] != "LORA"])
def test_a_tuner_trains_over_a_quantized_base_or_is_refused(
    case, quantization, tmp_path, tiny_base, demonstrations, seen, capsys
):
    tiny_base = build_zoo_model("llama", tmp_path / "untied") if case == "TRAINABLE_TOKENS" else tiny_base
    words = [f"quantization={quantization}"]

    code = run(sft.STAGE, tmp_path, tiny_base, demonstrations, "policy", CASES[case], *words)

    if find_obstacle(case, quantization):
        assert code == 2
        assert f"{case} cannot be set on a base in {quantization}" in capsys.readouterr().err
        return
    assert code == 0, capsys.readouterr().err
    assert_only_the_adapter_moved(seen)


ADAPTERS = {"OFT": {"peft_type": "OFT"}, "LORA": {}, "LOKR": {"peft_type": "LOKR"}}

RL = ["rewards=[{name: length, args: {target: 5}}]", "max_length=512"]
REFUSED = {
    "no-tuner": (sft, ["peft={r: 4}"], "peft.peft_type: missing"),
    "unknown-tuner": (sft, ["peft={peft_type: OFFT}"], "did you mean OFT"),
    "unknown-key": (sft, ["peft={peft_type: OFT, oft_blocksize: 4}"], "peft.oft_blocksize: no such .* oft_block_size"),
    "wrong-value": (sft, ["peft={peft_type: MISS, r: 400}"], "peft: .*must be less than or equal"),
    "our-own-key": (sft, ["peft={peft_type: OFT, inference_mode: true}"], "peft.inference_mode: this is set by align"),
    "both": (sft, ["peft={peft_type: OFT}", "lora.r=4"], "peft and lora: both describe"),
    "neither": (sft, ["peft={peft_type: OFT}", "lora=none"], "peft with lora=none"),
    "prompts": (
        sft,
        ["peft={peft_type: PREFIX_TUNING, num_virtual_tokens: 4}"],
        "trained vectors in front of each",
    ),
    "biases": (sft, ["peft={peft_type: BOFT, bias: all}"], "peft.bias: trained biases replace"),
    "layers": (sft, ["peft={peft_type: LORA, layer_replication: [[0, 1]]}"], "layer_replication: it copies layers"),
    "no-product": (
        sft,
        ["peft={peft_type: LORA, init_lora_weights: pissa, use_dora: true}"],
        "use_dora does not",
    ),
    "rounded": (
        sft,
        ["peft={peft_type: LORA, init_lora_weights: olora}", "quantization=nf4"],
        "give quantization=none",
    ),
    "unrounded": (sft, ["peft={peft_type: LORA, init_lora_weights: loftq}"], "give quantization=nf4"),
    "no-module": (sft, ["peft={peft_type: OFT, target_modules: [q_prj]}"], "peft.target_modules: q_prj asked"),
    "no-copy": (dpo, ["peft={peft_type: ADALORA, total_step: 3}"], "ADALORA cannot be a frozen copy"),
    "no-head": (reward, ["peft={peft_type: TRAINABLE_TOKENS, token_indices: [5]}"], "cannot carry a score head"),
    "ppo": (ppo, ["peft={peft_type: OFT}", "rewards=[{name: length}]"], "peft: this stage holds several adapters"),
    "grpo": (grpo, ["peft={peft_type: OFT}", "rewards=[{name: length}]"], "peft: this stage holds several adapters"),
    "ppo-start": (ppo, ["model=OFT", *RL], "OFT cannot train beside other adapters"),
    "grpo-start": (
        grpo,
        ["model=OFT", "num_generations=4", "max_completion_length=64", *RL],
        "OFT cannot train beside other adapters",
    ),
    "stack": (dpo, ["model=OFT", "adapter=stack"], "OFT cannot be trained on top of a frozen adapter"),
    "stack-new": (dpo, ["model=LORA", "adapter=stack", "peft={peft_type: OFT}"], "OFT cannot be trained on top"),
    "continued": (dpo, ["model=LORA", "peft={peft_type: OFT}"], "peft: lora@v1 is an adapter, which is trained"),
    "quantized": (sft, ["peft={peft_type: LOKR}", "quantization=nf4"], "LOKR cannot be set on a base in nf4"),
    "quantized-start": (sft, ["model=LOKR", "quantization=nf4"], "lokr@v1: LOKR cannot be set on a base in nf4"),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_base, demonstrations):
    """A registry with one adapter of OFT and one of LoRA."""
    root = tmp_path_factory.mktemp("adapters")
    for name, settings in ADAPTERS.items():
        assert run(sft.STAGE, root, tiny_base, demonstrations, name.lower(), settings) == 0
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_tuner_cannot_do_is_refused_before_weights_are_loaded(case, adapters, tiny_base, preferences, capsys):
    stage, words, message = REFUSED[case]
    words = [re.sub("^model=.*", lambda match: match[0].lower(), word) for word in words]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.models.loading.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
        assert run(stage.STAGE, adapters, tiny_base, preferences, "no", {}, *words) == 2

    assert re.search(message, capsys.readouterr().err), message


def test_generating_over_a_quantized_base_is_refused_where_peft_cannot_compute_it(adapters, capsys):
    words = ["lokr", "eggs?", "--registry", str(adapters), "--max-new-tokens", "4", "--quantization", "nf4"]

    assert generate.main(words) == 2

    assert "lokr@v1: LOKR cannot be set on a base in nf4" in capsys.readouterr().err


def test_adapters_of_two_tuners_are_not_put_on_one_base_but_evaluated_one_after_the_other(adapters, demonstrations):
    registry = open_registry(adapters)
    with pytest.raises(UsageError, match="oft@v1 is OFT, lora@v1 is LORA; PEFT holds one tuner a base"):
        load_models(registry, ["oft", "lora"], FP32)

    groups = model_runs._groups(registry, {name: registry.resolve(name) for name in ("oft", "lora")})

    assert [list(group) for group in groups] == [["oft"], ["lora"]]


@pytest.mark.parametrize("case", ["OFT", "SHIRA", "pissa", "eva"])
def test_a_plan_counts_what_will_be_trained_where_that_can_be_known(case, tmp_path, tiny_base, demonstrations, capsys):
    assert run(sft.STAGE, tmp_path, tiny_base, demonstrations, "plan", CASES[case], "--dry-run") == 0

    assert "memory" in capsys.readouterr().out
