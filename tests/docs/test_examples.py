from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from align.command_line import read_command_line
from align.config import build, read_yaml
from align.data.catalog import catalogue

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_every_stage_has_an_example():
    assert {"pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_configuration_of_its_stage(path):
    stage = importlib.import_module(f"align.{path.stem.split('-')[0]}").STAGE

    config = build(stage.config, read_yaml(path))

    assert config.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_on_a_dataset_of_the_catalogue(path):
    data = read_yaml(path)["data"]
    specs = [data] if isinstance(data, str) else data

    assert all(spec.split(":")[0] in catalogue() for spec in specs)


def readme_commands() -> list[str]:
    shown = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("examples/*.md")])
    blocks = re.findall(r"```sh\n(.*?)```", shown, re.S)
    lines = "".join(blocks).replace("\\\n", " ").replace("$beta", "0.1").splitlines()
    return [line.split("  #")[0].strip() for line in lines if "python -m align." in line]


def test_the_readme_shows_a_command_of_every_stage():
    shown = " ".join(readme_commands())

    assert all(f"python -m align.{stage}" in shown for stage in ("pretrain", "sft", "reward", "dpo", "kto", "ppo"))


@pytest.mark.parametrize("command", readme_commands())
def test_a_training_command_of_the_readme_is_valid(command):
    import shlex

    _, _, module, *words = shlex.split(command)
    assert (ROOT / "align" / f"{module.removeprefix('align.')}.py").is_file() or (
        ROOT / "align" / module.removeprefix("align.") / "__main__.py"
    ).is_file()
    stage = getattr(importlib.import_module(module), "STAGE", None) if module != "align.quickstart" else None
    if stage is not None and words[0] != "score":
        line = read_command_line([str(ROOT / word) if word.startswith("examples/") else word for word in words])
        build(stage.config, line.values)


def test_make_demo_runs_the_quickstart_that_the_readme_shows():
    import subprocess

    planned = subprocess.run(["make", "-n", "-C", str(ROOT), "demo"], capture_output=True, text=True, check=True).stdout
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert ".venv/bin/python -m align.quickstart" in planned.splitlines()
    assert "make demo" in readme
    assert "runs `python -m align.quickstart`" in readme
