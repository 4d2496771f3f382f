"""Real published files, as they are, through the command line of every stage, on a tiny Qwen3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align import dpo, ppo, reward, sft
from align.registry import Registry, open_registry
from align.training.command import main

SFT = ["medical_sft_zh.jsonl", "llamafactory_demo__alpaca_en_demo.json", "sharegpt_zh.jsonl"]
PAIRS = ["hh_harmless_test.jsonl.gz", "llamafactory_demo__dpo_zh_demo.json"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Registry:
    return open_registry(tmp_path_factory.mktemp("real") / "registry")


def train(stage, registry: Registry, start: object, data: Path, name: str, *words: str) -> dict:
    """Run a stage's command line for a few steps and return the manifest of what it registered."""
    small = ["max_steps=6", "per_device_train_batch_size=4", "logging_steps=1", "save_steps=0", "bf16=false"]
    line = [
        f"model={start}",
        f"data={data}",
        f"name={name}",
        "max_length=384",
        "on_bad_row=skip",
        "on_long=drop",
        *small,
        *words,
    ]
    assert main(stage, ["--registry", str(registry.root), *line]) == 0
    return registry.resolve(name).manifest


def losses(registry: Registry, name: str) -> list[float]:
    log = Path(registry.resolve(name).location) / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def start(registry, tiny_base, real_data) -> str:
    train(sft.STAGE, registry, tiny_base, real_data / "sft" / SFT[1], "start", "learning_rate=5e-3")
    return "start"


@pytest.mark.parametrize("file", SFT)
def test_sft_trains_on_a_real_file_and_its_loss_falls(registry, tiny_base, real_data, file):
    name = file.split(".")[0].split("__")[-1].replace("_", "-")

    manifest = train(sft.STAGE, registry, tiny_base, real_data / "sft" / file, name, "learning_rate=2e-2", "lora.r=8")

    assert manifest["base"]["location"] == str(tiny_base)
    assert manifest["data"][0]["rows"] >= 490
    curve = losses(registry, name)
    assert sum(curve[-2:]) < sum(curve[:2])


@pytest.mark.parametrize("file", PAIRS)
@pytest.mark.parametrize("stage", [reward.STAGE, dpo.STAGE], ids=["reward", "dpo"])
def test_preference_stages_train_on_a_real_file_from_an_sft_adapter(registry, start, real_data, stage, file):
    name = f"{stage.name}-{file.split('.')[0].split('__')[-1].replace('_', '-')}"

    manifest = train(stage, registry, start, real_data / "pref" / file, name)

    assert manifest["parents"][0]["reference"] == "start@v1"
    assert manifest["data"][0]["rows"] > 250
    assert registry.verify(name) == []


def test_ppo_runs_on_gsm8k_with_a_numeric_reward(registry, start, real_data):
    words = ["rewards=[{name: numeric_match}]", "max_steps=2", "sampling.max_new_tokens=16", "rollout_batch_size=8"]

    manifest = train(ppo.STAGE, registry, start, real_data / "verifiable" / "gsm8k_train.jsonl", "maths", *words)

    assert manifest["kind"] == "policy"
    assert manifest["parents"][0]["reference"] == "start@v1"
    first = json.loads((Path(registry.resolve("maths").location) / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
