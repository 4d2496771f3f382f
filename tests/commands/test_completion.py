from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from align.completion import SCRIPTS, completions, main
from align.errors import UsageError
from align.registry import open_registry


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("s", {"sft", "serve"}),
        ("sft lora.d", {"lora.dropout="}),
        ("sft --learning", {"--learning_rate"}),
        ("sft on_long=dr", {"on_long=drop"}),
        ("sft --on-long dr", {"drop"}),
        ("dpo data=world-preferences", {"data=world-preferences", "data=world-preferences-eval"}),
        ("registry lin", {"lineage"}),
        ("registry merge --dt", {"--dtype"}),
        ("registry merge --dtype bf", {"bfloat16"}),
        ("evaluate --judge_t", {"--judge_timeout"}),
        ("completion z", {"zsh"}),
        ("sft --registry ", set()),
        ("sft --resume --allow-change learn", {"learning_rate"}),
        ("nonsense ", set()),
    ],
)
def test_the_words_that_may_come_next(line, words):
    assert set(completions(line)) == words


def test_registered_models_are_completed(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_REGISTRY", str(tmp_path))
    with open_registry(tmp_path).stage("support-sft") as staging:
        (staging.path / "config.json").write_text("{}")
        staging.commit({"stage": "sft", "kind": "base"})

    assert list(completions("dpo model=sup")) == ["model=support-sft"]
    assert list(completions("generate su")) == ["support-sft"]


def test_completing_loads_no_heavy_library():
    code = (
        "import sys; from align.completion import completions as of; list(of('ppo ')); list(of('serve --'));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_is_one_its_shell_can_read(shell, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")

    assert main([shell]) == 0

    done = subprocess.run([shell, "-n"], input=capsys.readouterr().out, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_a_setting(tmp_path):
    (tmp_path / "align").write_text(f'#!/bin/sh\nexec {sys.executable} -m align "$@"\n')
    (tmp_path / "align").chmod(0o755)
    line = "align sft on_long=tr"
    script = (
        f'PATH={tmp_path}:$PATH; eval "$(align completion bash)"; COMP_LINE="{line}"; COMP_POINT={len(line)}; _align; '
        'echo "${COMPREPLY[@]}"'
    )

    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)

    assert done.stdout == "truncate_left\n"


def test_another_shell_is_refused():
    with pytest.raises(SystemExit) as ended:
        main(["tcsh"])

    assert ended.value.code == UsageError.exit_code
