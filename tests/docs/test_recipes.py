"""Recipes of the page, run as they stand on a real pretrained model of 135 million parameters.

The orders of coffee are Taskmaster's where that file is beside the checkout, and otherwise what the example writes.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from page_commands import ROOT, commands, write_recipe_files

from align import evaluate, sft
from align.training.command import main as run_stage_main

TASKMASTER = ROOT.parent / "shared" / "data" / "dev" / "customer_service" / "taskmaster4_coffee.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the files of the recipes."""
    folder = tmp_path_factory.mktemp("recipes")
    write_recipe_files(folder)
    if TASKMASTER.is_file():
        shutil.copy(TASKMASTER, folder / "taskmaster.json")
    return folder


def words_of(command: str, name: str) -> list[str]:
    """Return the words of the page's command for an adapter."""
    shown = commands("docs/recipes.md", optional=False)
    (found,) = [line for line in shown if re.match(rf"align {command} .*\b{name}\b", line)]
    return shlex.split(found)[2:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "score"), [("coffee", "rougeL"), ("sentiment", "accuracy"), ("summaries", "rougeL"), ("french", "chrf")]
)
def test_a_recipe_lowers_held_out_loss_and_raises_its_score(name, score, files, smollm2_registry, monkeypatch):
    monkeypatch.chdir(files)
    registry = ["--registry", str(smollm2_registry)]

    assert run_stage_main(sft.STAGE, [*words_of("sft", name), *registry]) == 0
    assert evaluate.main([*words_of("evaluate", name), *registry, "--json", f"{name}.json"]) == 0

    before, after = json.loads(Path(f"{name}.json").read_text())["models"]
    assert after["comparison"]["perplexity"]["high"] < 0, (before["metrics"], after["metrics"])
    assert after["comparison"][score]["low"] > 0, (before["metrics"], after["metrics"])
