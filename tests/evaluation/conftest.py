"""A registry with a tiny base, two loud adapters over it, one trained from the other, and a reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.registry import Registry, open_registry

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \u202e &amp;"


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Registry:
    """base@v1 <- red@v1 <- blue@v1, and judge@v1, which scores."""
    import torch

    from align.config import LoraSettings
    from align.models.adapters import digests_of_base, save_adapter, start_policy
    from align.models.heads import start_reward
    from align.models.loading import Precision
    from align.registry.fingerprints import base_digests

    registry = open_registry(tmp_path_factory.mktemp("family"))
    with registry.stage("base") as staging:
        shutil.copytree(tiny_base, staging.path, dirs_exist_ok=True)
        _loud(staging.path)
        digests = base_digests(staging.path)
        base = staging.commit({"stage": "pretrain", "kind": "base", "parents": [], "base": {"digests": digests}})

    def save(name: str, kind: str, loaded: Any, parent: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        for key, value in loaded.model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.4)
        with registry.stage(name) as staging:
            save_adapter(loaded.model, "default", staging.path, base.location)
            loaded.tokenizer.save_pretrained(staging.path)
            return staging.commit(
                {
                    "stage": {"policy": "sft", "reward": "reward"}[kind],
                    "kind": kind,
                    "parents": [{"reference": parent.reference, "digest": parent.digest}],
                    "base": {
                        "reference": base.reference,
                        "location": base.location,
                        "digests": digests_of_base(base),
                    },
                }
            )

    lora, fp32 = LoraSettings(r=4, alpha=16), Precision(bf16=False)
    red = save("red", "policy", start_policy(registry, base, lora, fp32), base, 1)
    save("blue", "policy", start_policy(registry, base, lora, fp32), red, 2)
    save("judge", "reward", start_reward(registry, base, lora, fp32), base, 3)
    return registry


def _loud(folder: Path) -> None:
    """Fresh weights give nearly flat logits; these differ within a few tokens."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = state["model.norm.weight"] * 20
    save_file(state, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve demonstrations of two kinds and two languages, one of them hostile, with answers."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    words = "the quick brown fox jumps over a lazy dog and runs".split()
    rows = []
    for place in range(12):
        asked = "今天 天气 很好 吗？" if place % 3 == 0 else " ".join(words[: 3 + place % 7]) + "?"
        asked = f"{asked} {HOSTILE} {place}" if place % 4 == 1 else f"{asked} {place}"
        answer = ["yes", "no"][place % 2]
        rows.append(
            {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": f"{answer}, {words[place % 10]}"}],
                "answer": answer,
                "meta": {"kind": ["easy", "hard"][place % 2]},
            }
        )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
