from __future__ import annotations

import importlib

import pytest
from page_commands import ROOT

from align.__main__ import STAGES
from align.config import build
from align.data.catalog import catalogue
from align.strict_yaml import read_yaml

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_every_stage_has_an_example():
    assert set(STAGES) <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_configuration_of_its_stage(path):
    stage = importlib.import_module(f"align.{path.stem.split('-')[0]}").STAGE

    config = build(stage.config, read_yaml(path))

    assert config.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_it_is_run(path):
    assert path.read_text(encoding="utf-8").startswith(f"# align {path.stem.split('-')[0]} examples/{path.name}\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_on_a_dataset_of_the_catalogue(path):
    data = read_yaml(path)["data"]
    specs = [data] if isinstance(data, str) else data

    assert all(spec.split(":")[0] in catalogue() for spec in specs)
