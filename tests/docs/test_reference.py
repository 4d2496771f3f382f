"""The generated pages: every command and setting, and the index of decisions."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest
from page_commands import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_written_before_a_site_is_built(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "PAGE", tmp_path / "reference.md")
    monkeypatch.setattr(maker, "DECISIONS", tmp_path / "index.md")

    maker.on_pre_build(None)

    assert (tmp_path / "reference.md").read_text(encoding="utf-8") == maker.reference()
    assert (tmp_path / "index.md").is_file()


def test_the_reference_has_a_section_of_every_command_and_a_line_of_every_setting(maker):
    from align.__main__ import COMMANDS, STAGES
    from align.command_line import options_of

    page = maker.reference()

    assert all(f"### `align {name}`" in page for name in COMMANDS)
    for name in STAGES:
        config = importlib.import_module(f"align.{name}").STAGE.config
        assert all(f"| `{option.key}` |" in page for option in options_of(config))
    assert "align registry lineage" in page


def test_the_index_lists_every_decision_and_a_number_stands_for_one(maker):
    notes = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    numbers = [int(note.name[:4]) for note in notes]

    assert len(set(numbers)) == len(numbers)
    assert all(f"({note.name})" in maker.decisions() for note in notes)
    assert [int(re.match(r"# (\d+)\. ", note.read_text(encoding="utf-8"))[1]) for note in notes] == numbers
