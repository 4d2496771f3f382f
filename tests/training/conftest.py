"""Runs in processes of their own that can really be killed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aftermath import checkpoints, versions
from warm import Warm

STEPS = 20


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


class Course:
    """A stage with its settings: 20 steps, 8 of them an epoch, a checkpoint every 4."""

    def __init__(self, stage: str, settings: dict[str, Any]) -> None:
        self.stage, self.settings = stage, settings

    def words(self, root: Path, *more: str, **changed: Any) -> list[str]:
        """The command line; a setting that is None is left out."""
        given = (self.settings | changed).items()
        return ["--registry", str(root), *(f"{key}={value}" for key, value in given if value is not None), *more]

    def held_out(self, folder: Path) -> Path:
        """A file of 16 rows that are none of the training data."""
        path = folder / "held_out.jsonl"
        lines = Path(str(self.settings["data"]).partition(":")[0]).read_text().splitlines()[:16]
        path.write_text("".join(line.replace('"content": "', '"content": "well ') + "\n" for line in lines))
        return path


def build_course(stage: str, base: Path, demonstrations: Path, preferences: Path) -> Course:
    settings = {
        "model": base, "data": demonstrations if stage == "sft" else preferences, "name": "run", "max_steps": STEPS,
        "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": "false",
        "lora.r": 2, "lora.dropout": 0.1, "seed": 1,
    }  # fmt: skip
    if stage == "pretrain":
        settings |= {
            "model": "scratch:tiny", "data": f"{demonstrations}:limit=32", "vocab_size": 300, "block_size": 16,
            "per_device_train_batch_size": 11, "lora.r": None, "lora.dropout": None,
        }  # fmt: skip
    if stage == "kto":
        settings |= {"per_device_train_batch_size": 16}
    return Course(stage, settings)


@pytest.fixture(
    scope="session", params=["sft", "pretrain", "reward", "dpo", pytest.param("kto", marks=pytest.mark.slow)]
)
def course(request, tiny_base, demonstrations, preferences) -> Course:
    return build_course(request.param, tiny_base, demonstrations, preferences)


@pytest.fixture(scope="session")
def straight(warm, course, tmp_path_factory) -> Path:
    """The registry of a run that nobody touched."""
    root = tmp_path_factory.mktemp(f"straight-{course.stage}")
    ended = warm.run(course.stage, course.words(root))
    assert ended.code == 0, ended.err
    return root


@pytest.fixture(scope="session")
def killed(warm, course, tmp_path_factory) -> Path:
    """The registry of a run killed at steps 6, 10 and 14 and resumed in between; checkpoints 8 and 12 are whole."""
    root = tmp_path_factory.mktemp(f"killed-{course.stage}")
    for step, more, told in (
        (6, [], ""),
        (10, ["--resume"], "\nresuming from step 4\n"),
        (14, ["--resume"], "\nresuming from step 8\n"),
    ):
        ended = warm.run(course.stage, course.words(root, *more), signal=signal.SIGKILL, at_step=step)
        assert ended.code == -signal.SIGKILL, ended.err
        assert told in ended.out
    assert checkpoints(root) == ["checkpoint-8", "checkpoint-12"]
    assert versions(root) == []
    return root


@pytest.fixture
def copied(killed, tmp_path) -> Path:
    """The killed run, for a test to damage or to go on with."""
    return shutil.copytree(killed, tmp_path / "registry")
