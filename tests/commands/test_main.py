from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from align.__main__ import COMMANDS, main
from align.errors import UsageError


def test_every_command_that_is_listed_exists():
    assert all(importlib.util.find_spec(f"align.{name}") for name in COMMANDS)


def test_the_overview_names_commands_and_says_that_nothing_is_registered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALIGN_REGISTRY", str(tmp_path))

    assert main([]) == 0

    printed = capsys.readouterr().out
    assert "align dpo" in printed
    assert f"nothing is registered in {tmp_path} yet" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stf"], "stf: no command; did you mean sft"),
        (["--version"], "--version: no command;"),
    ],
)
def test_what_is_asked_of_the_overview_is_refused_and_not_ignored(words, message, capsys):
    assert main(words) == UsageError.exit_code

    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["sft", "--help"], 0),
        (["data", "list"], 0),
        (["registry", "lineage", "nobody"], 4),
        (["dpo", "beta=0.1"], 2),
        (["data", "check", "no-such-file.jsonl"], 3),
    ],
)
def test_a_command_is_the_module_of_its_name(words, code, tmp_path):
    command, *rest = words
    by_name, by_module = (
        subprocess.run([sys.executable, "-m", *start, *rest], capture_output=True, text=True, cwd=tmp_path, check=False)
        for start in (["align", command], [f"align.{command}"])
    )

    assert by_name.returncode == code
    assert (by_name.returncode, by_name.stdout, by_name.stderr) == (
        by_module.returncode,
        by_module.stdout,
        by_module.stderr,
    )


def test_the_overview_and_help_load_no_heavy_library(tmp_path):
    script = (
        "import sys; from align.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'trl', 'gradio', 'datasets'} & set(sys.modules)))"
    )

    for words in ([], ["--help"], ["ppo", "--help"], ["serve", "--help"], ["registry", "--help"]):
        run = subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, check=False)
        assert run.returncode == 0, words
