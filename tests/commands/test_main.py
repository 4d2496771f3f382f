from __future__ import annotations

import importlib.util

import pytest

from align.__main__ import COMMANDS, main
from align.errors import UsageError


def test_every_command_that_is_listed_exists():
    assert all(importlib.util.find_spec(f"align.{name}") for name in COMMANDS)


def test_the_overview_names_commands_and_says_that_nothing_is_registered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALIGN_REGISTRY", str(tmp_path))

    main([])

    printed = capsys.readouterr().out
    assert "python -m align.dpo" in printed
    assert f"nothing is registered in {tmp_path} yet" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--name", "x"], "sft: commands are written with a dot; run python -m align.sft"),
        (["stf"], "stf: no command; did you mean sft"),
        (["--version"], "--version: no command;"),
    ],
)
def test_what_is_asked_of_the_overview_is_refused_and_not_ignored(words, message):
    with pytest.raises(UsageError) as refused:
        main(words)

    assert message in str(refused.value)
