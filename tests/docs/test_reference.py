from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help otherwise in other versions")
def test_the_reference_is_what_the_code_says(maker):
    assert maker.PAGE.read_text(encoding="utf-8") == maker.reference(), "run python docs/make_reference.py"


def test_the_reference_has_a_section_of_every_command_and_a_line_of_every_setting(maker):
    from align.__main__ import COMMANDS
    from align.command_line import options_of
    from align.ppo import STAGE

    page = maker.reference()

    assert all(f"### `align {name}`" in page for name in COMMANDS)
    assert all(f"| `{option.key}` |" in page for option in options_of(STAGE.config))
    assert "align registry lineage" in page
