from __future__ import annotations

import importlib.util

from align.__main__ import COMMANDS, main


def test_every_command_that_is_listed_exists():
    assert all(importlib.util.find_spec(f"align.{name}") for name in COMMANDS)


def test_the_overview_names_commands_and_says_that_nothing_is_registered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALIGN_REGISTRY", str(tmp_path))

    main()

    printed = capsys.readouterr().out
    assert "python -m align.dpo" in printed
    assert f"nothing is registered in {tmp_path} yet" in printed
