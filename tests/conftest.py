"""Shared fixtures: an offline, quiet environment, one tiny base a session, an empty registry a test."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    GRADIO_ANALYTICS_ENABLED="False",
    CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
)
os.environ.pop("ALIGN_REGISTRY", None)

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "dev"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build_tiny_qwen3

    return build_tiny_qwen3(tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture
def registry(tmp_path: Path):
    from align.registry import open_registry

    return open_registry(tmp_path / "registry")


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the folder of real data sets is not beside this checkout")
    return SHARED


def _sentence(rng: random.Random, low: int, high: int) -> str:
    from tiny import WORDS

    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 conversations of one or two turns."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    with path.open("w") as file:
        for index in range(64):
            turns = []
            for _ in range(1 + index % 2):
                turns.append({"role": "user", "content": _sentence(rng, 3, 8)})
                turns.append({"role": "assistant", "content": _sentence(rng, 3, 9)})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs in which the chosen answer always says 'blue eggs'."""
    rng = random.Random(2)
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    with path.open("w") as file:
        for _ in range(64):
            row = {
                "prompt": [{"role": "user", "content": _sentence(rng, 3, 8)}],
                "chosen": [{"role": "assistant", "content": _sentence(rng, 2, 5) + " blue eggs"}],
                "rejected": [{"role": "assistant", "content": _sentence(rng, 3, 6)}],
            }
            file.write(json.dumps(row) + "\n")
    return path
