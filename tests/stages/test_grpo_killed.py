"""GRPO killed without a word goes on from its last checkpoint and ends where an undisturbed run ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warm import Warm

from align.registry import open_registry


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, tiny_base):
    root, data = tmp_path / "registry", tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} and {n}?", "answer": str(2 * n)}) + "\n" for n in range(12)))
    rewards = "rewards=[{name: keyword, args: {words: [e]}}, {name: length, weight: 0.5, args: {target: 2}}]"
    words = [
        "--registry", str(root), f"model={tiny_base}", f"data={data}", rewards,
        "bf16=false", "max_length=96", "max_completion_length=6", "num_generations=4", "num_iterations=2", "beta=0.1",
        "learning_rate=1e-2", "max_steps=20", "save_steps=2", "logging_steps=1", "per_device_train_batch_size=8",
    ]  # fmt: skip
    warm = Warm(tmp_path)

    whole = warm.run("grpo", [*words, "name=whole"])
    killed = warm.run("grpo", [*words, "name=parts"], signal=signal.SIGKILL, at_step=5)
    assert (whole.code, killed.code) == (0, -signal.SIGKILL), whole.err + killed.err
    assert open_registry(root).names() == ["whole"]
    done = warm.run("grpo", [*words, "name=parts", "--resume"])
    warm.close()

    assert done.code == 0, done.err
    assert "resuming from step 4" in done.out
    registry = open_registry(root)
    one, two = (load_file(Path(registry.resolve(name).location) / "adapter_model.safetensors") for name in
                ("whole", "parts"))  # fmt: skip
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert timeless(registry, "whole") == timeless(registry, "parts")


def timeless(registry, name):
    rows = [
        json.loads(line) for line in (Path(registry.resolve(name).location) / "metrics.jsonl").read_text().splitlines()
    ]
    return [{key: row[key] for key in row if "tokens_per_second" not in key and key != "step_time"} for row in rows]
