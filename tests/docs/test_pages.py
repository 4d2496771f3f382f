"""Everything the pages show exists: commands parse, settings are known, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess

import pytest
from page_commands import PAGES, ROOT, commands, inline_settings

from align.__main__ import COMMANDS, STAGES, TOOLS
from align.command_line import options_by_key, options_of, parse_options, read_command_line
from align.completion import module_of
from align.config import build
from align.data.catalog import SETTINGS
from align.strict_yaml import load_yaml

SHOWN = [(page, command) for page in PAGES for command in commands(page, optional=True)]
NO_SETTING = {"key", "base_url", "view", "batched", "answer_only"}
"""placeholders, and arguments of functions and of other programs"""


def test_the_readme_is_one_page():
    readme = PAGES["README.md"]

    assert len(readme.splitlines()) <= 160
    assert len(readme.split()) < 1200


@pytest.mark.parametrize("name", [*TOOLS, "pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_the_readme_and_a_page_show_every_command(name):
    assert re.search(rf"align[ .]{name}\b", PAGES["README.md"])
    assert any(command.split()[1] == name for _, command in SHOWN)


def test_the_reward_file_of_the_page_is_one_that_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", PAGES["docs/ppo.md"], re.S)[1]
    (tmp_path / "my_rewards.py").write_text(code)
    settings = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGES["docs/ppo.md"], re.S) if "file:" in block)
    required = {"model": "m", "data": "d", "name": "n", "max_length": 256}

    config = build(importlib.import_module("align.ppo").STAGE.config, required | load_yaml(settings, "docs/ppo.md"))

    assert [reward.name for reward in config.rewards] == ["numeric_match", "short_steps"]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_command_of_a_page_is_one_that_can_be_given(page, command):
    _, name, *words = shlex.split(command)
    module = importlib.import_module(module_of(name))
    if name in STAGES and words[0] != "score":
        if not {"--help"} & set(words):
            files = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
            build(module.STAGE.config, read_command_line(files).values)
    elif name == "reward":
        from align.evaluation.reward_score_file import build_parser

        parse_options(build_parser(), words[1:])
    elif name != "quickstart":
        parse_options(module.build_parser(), words)


def known_settings() -> set[str]:
    """Every key that a stage, a dataset or a tool's option has."""
    keys = {
        option.key for name in STAGES for option in options_of(importlib.import_module(f"align.{name}").STAGE.config)
    }
    for name in set(COMMANDS) - set(STAGES) - {"quickstart"}:
        keys |= set(options_by_key(importlib.import_module(module_of(name)).build_parser()))
    return keys | SETTINGS | {"completion", "prompt"} | NO_SETTING


@pytest.mark.parametrize("page", PAGES)
def test_a_setting_in_the_text_of_a_page_exists(page):
    known = known_settings()

    unknown = [key for key in inline_settings(page) if key not in known and not key.startswith("trainer.")]

    assert unknown == []


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[page])
    generated = {"reference.md", "decisions/index.md"}

    assert [
        link for link in links if "://" not in link and link not in generated and not (folder / link).exists()
    ] == []


def test_make_demo_runs_the_quickstart_that_the_readme_shows():
    planned = subprocess.run(["make", "-n", "-C", str(ROOT), "demo"], capture_output=True, text=True, check=True).stdout

    assert ".venv/bin/python -m align.quickstart" in planned.splitlines()
    assert "make demo" in PAGES["README.md"]
    assert "runs `python -m align.quickstart`" in PAGES["README.md"]


def test_make_demo_real_runs_the_quickstart_on_the_real_model():
    planned = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "demo-real"], capture_output=True, text=True, check=True
    ).stdout

    assert ".venv/bin/python -m align.quickstart --real" in planned.splitlines()
    assert "make demo-real" in PAGES["README.md"]
    assert "make demo-real" in PAGES["docs/real_model.md"]
