"""Rewards in a whole PPO run: those that fail end it with exit code 3, and a gold one changes no bit of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.ppo import STAGE
from align.rewards import reward
from align.training.command import main

RETURNED: list = [0.0]


@reward
def returns_in_these_runs(record, completion):
    return RETURNED[0]() if callable(RETURNED[0]) else RETURNED[0]


@reward(batched=True)
def returns_to_many_in_these_runs(records, completions):
    return RETURNED[0]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"question": f"what is {n} and {n}", "answer": str(n + n)} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(registry, tiny_base, prompts) -> list[str]:
    return [
        "--registry", str(registry.root), f"model={tiny_base}", f"data={prompts}", "bf16=false", "max_steps=2",
        "rollout_batch_size=4", "per_device_train_batch_size=2", "sampling.max_new_tokens=5", "max_length=64",
        "lora.r=2", "learning_rate=1e-2", "num_ppo_epochs=2", "save_steps=0",
    ]  # fmt: skip


def divide():
    return 1 / 0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("returns_in_these_runs", divide, "raised ZeroDivisionError for the completion"),
        ("returns_in_these_runs", float("nan"), "returned nan for the completion"),
        ("returns_in_these_runs", [1.0, 2.0], "returned 2 values, [1.0, 2.0], for the completion"),
        ("returns_in_these_runs", "good", "returned 'good' for the completion"),
        (
            "returns_to_many_in_these_runs",
            [1.0] * 3,
            "returned 3 values, [1.0, 1.0, 1.0], for 4 completions, the first",
        ),
        ("returns_to_many_in_these_runs", [0.0, 0.0, float("inf"), 0.0], "returned inf for the completion"),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_its_name_the_completion_and_the_row(
    registry, words, prompts, capsys, name, value, told
):
    RETURNED[:] = [value]

    assert (
        main(STAGE, [*words, "name=tuned", f"rewards=[{{name: length, args: {{target: 3}}}}, {{name: {name}}}]"]) == 3
    )

    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"error: reward {name}: {told} '" in line
    assert f" of {prompts}:" in line
    assert "tuned" not in registry.names()


def test_a_gold_reward_that_fails_is_told_as_well(registry, words, capsys):
    RETURNED[:] = [None]
    rewards = ["rewards=[{name: length, args: {target: 3}}]", "gold=[{name: returns_in_these_runs}]"]

    assert main(STAGE, [*words, "name=tuned", *rewards]) == 3

    assert "reward returns_in_these_runs: returned None for the completion" in capsys.readouterr().err


def test_a_run_with_gold_equals_a_run_without_bit_for_bit(registry, words, no_pictures):
    RETURNED[:] = [lambda: float(torch.rand(()))]
    words = [*words, "rewards=[{name: length, args: {target: 12, unit: characters}}]"]

    assert main(STAGE, [*words, "name=plain"]) == 0
    assert main(STAGE, [*words, "name=watched", "gold=[{name: returns_in_these_runs}]"]) == 0

    plain, watched = (registry.resolve(name) for name in ("plain", "watched"))
    one, other = (load_file(Path(made.location) / "adapter_model.safetensors") for made in (plain, watched))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    log, watched_log = timeless(plain), timeless(watched)
    assert all(row.pop("gold_mean") >= 0 for row in watched_log)
    assert log == watched_log
    assert "gold_mean" in watched.manifest["metrics"]


def timeless(made) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (Path(made.location) / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if "per_second" not in key} for row in rows]
