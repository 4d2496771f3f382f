"""What holds for every trainer, whoever wrote it: what moves and what stays, and symmetries of the losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align import dpo, grpo, kto, reward, sft
from align.config import build
from align.registry import Registry, open_registry
from align.training.command import main, run_stage
from align.training.run import open_run

SETTINGS = {
    "bf16": False, "max_length": 96, "learning_rate": 1e-2, "max_steps": 2, "warmup_ratio": 0.0, "logging_steps": 1,
    "save_steps": 0, "per_device_train_batch_size": 8,
}  # fmt: skip
SGD = {"max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "trainer": {"optim": "sgd"}}
EGG = {"name": "keyword", "args": {"words": ["e"]}}
STAGES = {
    "sft": (sft.STAGE, {}),
    "reward": (reward.STAGE, {}),
    "dpo": (dpo.STAGE, {"cache_reference": False}),
    "kto": (kto.STAGE, {"cache_reference": False}),
    "grpo": (grpo.STAGE, {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "rewards": [EGG]}),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_base, demonstrations) -> Registry:
    """A registry with an SFT adapter that has moved far from its base."""
    registry = open_registry(tmp_path_factory.mktemp("invariants"))
    words = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    given = ["--registry", str(registry.root), *words, f"model={tiny_base}", f"data={demonstrations}", "name=start"]
    assert main(sft.STAGE, [*given, "learning_rate=3e-2", "lora.r=4"]) == 0
    return registry


def _saved(registry: Registry, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(registry.resolve(name).location) / "adapter_model.safetensors")


def _adapter(model, name: str) -> dict[str, torch.Tensor]:
    parts = {key: value.detach() for key, value in model.named_parameters() if f".{name}." in key}
    return {key.replace(f".{name}.", "."): value for key, value in parts.items()}


def _train(registry: Registry, stage, data: Path, name: str, **changed) -> list[dict]:
    """Train and register; return the log."""
    settings = SETTINGS | {"model": "start", "data": str(data), "name": name} | changed
    made = run_stage(stage, build(stage.config, settings), registry, resume=False)
    return [json.loads(line) for line in (Path(made.location) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", STAGES)
def test_every_trained_tensor_moves_and_base_and_reference_stay(shared, tiny_base, preferences, name):
    stage, more = STAGES[name]
    config = build(stage.config, SETTINGS | {"model": "start", "data": str(preferences), "name": "moved"} | more)

    with open_run(stage, config, shared, resume=False) as run:
        model = stage.run(config, run).model

    start, trained = _saved(shared, "start"), _adapter(model, "default")
    assert start.keys() <= trained.keys()
    assert not [key for key in start if torch.equal(trained[key], start[key])]
    if name in ("dpo", "kto", "grpo"):
        assert all(torch.equal(value, start[key]) for key, value in _adapter(model, "ref").items())
    now = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    for key, value in AutoModelForCausalLM.from_pretrained(tiny_base).model.state_dict(prefix="model.").items():
        assert torch.equal(now[key], value), key


def test_a_dpo_step_on_swapped_pairs_is_the_opposite_one_and_grows_with_beta(shared, preferences, tmp_path):
    """At the start every log-ratio is 0, so the gradient is -beta/2 (grad log p(chosen) - grad log p(rejected))."""
    rows = [json.loads(line) for line in preferences.read_text().splitlines()[:8]]
    swapped = tmp_path / "swapped.jsonl"
    swapped.write_text(
        "".join(json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) + "\n" for row in rows)
    )
    straight = tmp_path / "straight.jsonl"
    straight.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name, data, beta in (("one", straight, 0.1), ("mirrored", swapped, 0.1), ("double", straight, 0.2)):
        _train(shared, dpo.STAGE, data, name, beta=beta, **SGD)

    start = _saved(shared, "start")
    one, mirrored, double = (
        {key: value - start[key] for key, value in _saved(shared, name).items()}
        for name in ("one", "mirrored", "double")
    )
    scale = max(float(value.abs().max()) for value in one.values())
    assert scale > 1e-6
    for key, step in one.items():
        assert torch.allclose(mirrored[key], -step, atol=1e-2 * scale), key
        assert torch.allclose(double[key], 2 * step, atol=1e-2 * scale), key


def test_a_constant_added_to_every_reward_changes_nothing_and_equal_rewards_teach_nothing(shared, preferences):
    """Advantages are what a completion has over the mean of its group."""
    always = {"name": "regex", "args": {"pattern": "(?s).*"}, "weight": 5.0}
    settings = STAGES["grpo"][1] | {"beta": 0.0, "scale_rewards": "none", "trainer": {"optim": "sgd"}}

    plain = _train(shared, grpo.STAGE, preferences, "plain", **settings)
    shifted = _train(shared, grpo.STAGE, preferences, "shifted", **settings | {"rewards": [EGG, always]})
    flat = _train(shared, grpo.STAGE, preferences, "flat", **settings | {"rewards": [always]})

    assert [row["reward"] for row in shifted] == pytest.approx([row["reward"] + 5 for row in plain])
    start, after, moved, stayed = (_saved(shared, name) for name in ("start", "plain", "shifted", "flat"))
    assert any(not torch.equal(after[key], start[key]) for key in start)
    assert all(torch.allclose(moved[key], after[key], rtol=0, atol=1e-7) for key in start)
    assert all(torch.equal(stayed[key], start[key]) for key in start)
    assert all(row["loss"] == pytest.approx(0, abs=1e-7) for row in flat)
