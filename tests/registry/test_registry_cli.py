from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from align.registry.__main__ import main


@pytest.fixture
def filled(registry, commit):
    base = commit(registry, "base", "pretrain", "base", metrics={"loss": 2.5})
    parent = {"reference": base.reference, "digest": base.digest}
    data = [{"name": "faq", "digest": "sha256:0", "rows": 90, "dropped": {"too long": 2}}]
    commit(registry, "m", base={"reference": "base@v1"}, parents=[parent], data=data, metrics={"loss": 1.25})
    return registry


@pytest.fixture
def run(filled, capsys):
    """Run a command in this process; returns (exit code, stdout, stderr)."""

    def command(*words):
        code = main([*words, "--registry", str(filled.root)])
        return code, *capsys.readouterr()

    return command


def _python(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def test_the_installed_command_has_the_promised_exit_codes(filled, tmp_path):
    command = ("-m", "align.registry", "--registry", str(filled.root))

    listed = _python(*command, "ls", cwd=tmp_path)
    misused = _python(*command, "frobnicate", cwd=tmp_path)
    unknown = _python(*command, "show", "n", cwd=tmp_path)

    assert (listed.returncode, misused.returncode, unknown.returncode) == (0, 2, 4)
    assert "m@v1" in listed.stdout
    assert unknown.stderr.count("\n") == 1
    assert "Traceback" not in unknown.stderr + misused.stderr


LIGHT = [
    "ls", "ls --json", "show m", "lineage m", "diff base m", "verify", "alias m best v1", "doctor --repair", "gc --yes",
    "export m m.tar --with-base", "import m.tar --name other", "rm other@v1", "alias m best --remove",
]  # fmt: skip


def test_the_commands_import_nothing_heavy(filled, tmp_path):
    script = (
        "import sys; from align.registry.__main__ import main\n"
        f"codes = [main([*line.split(), '--registry', {str(filled.root)!r}]) for line in {LIGHT!r}]\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub', 'peft'} & set(sys.modules)\n"
        "sys.exit(','.join(sorted(heavy)) or ','.join(map(str, codes)))"
    )

    done = _python("-c", script, cwd=tmp_path)

    assert done.stderr.splitlines()[-1] == ",".join("0" for _ in LIGHT)


@pytest.mark.parametrize("command", ["", "merge", "push", "import", "doctor"])
def test_help_says_what_a_command_does_and_imports_nothing_heavy(command, tmp_path):
    script = (
        "import sys; from align.registry.__main__ import main\n"
        f"try: main({[*command.split(), '--help']!r})\n"
        "except SystemExit as end: sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or end.code)"
    )

    done = _python("-c", script, cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: align registry {command}".rstrip())


def test_ls_shows_versions_parents_numbers_and_aliases(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run("alias", "m", "best", "v1")

    code, out, _ = run("ls")

    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["reference", "aliases", "stage", "kind", "from", "base", "metric", "age", "size"]
    assert lines[1].split() == ["base@v1", "latest", "pretrain", "base", "-", "-", "loss", "2.5", "now", "87", "B"]
    assert lines[2].startswith("m@v1       best, latest  sft       policy  base@v1  base@v1  loss 1.25  now  ")


def test_ls_json_is_for_programs(run):
    rows = json.loads(run("ls", "--json")[1])

    assert [row["reference"] for row in rows] == ["base@v1", "m@v1"]
    assert rows[1]["parents"] == ["base@v1"]
    assert rows[1]["metrics"] == {"loss": 1.25}


def test_ls_of_nothing_says_what_to_do_next(tmp_path, capsys):
    assert main(["ls", "--registry", str(tmp_path / "none")]) == 0

    assert "align quickstart" in capsys.readouterr().out


def test_show_tells_what_a_checkpoint_is(run):
    code, out, _ = run("show", "m")

    assert code == 0
    for fact in ("m@v1", "policy", "base@v1", "faq, 90 rows, 2 dropped", "loss 1.25", "adapter_model.safetensors"):
        assert fact in out
    assert json.loads(run("show", "m", "--json")[1])["manifest"]["stage"] == "sft"


def test_show_of_a_plain_folder_says_that_nothing_is_recorded(run, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")

    assert "not in the registry" in run("show", str(tmp_path / "plain"))[1]


def test_lineage_draws_a_tree(run):
    assert run("lineage", "m")[1] == "m@v1  (sft, policy)\n└─ base@v1  (pretrain, base)\n"
    assert json.loads(run("lineage", "m", "--json")[1])["parents"][0]["reference"] == "base@v1"


def test_alias_says_where_it_pointed_before(run, filled, commit):
    commit(filled, "m")

    assert run("alias", "m", "best", "1")[1] == "m@best is now m@v1\n"
    assert run("alias", "m", "best", "v2")[1] == "m@best is now m@v2 (was v1)\n"


def test_an_alias_can_be_taken_away(run, filled):
    run("alias", "m", "best", "1")

    assert run("alias", "m", "best", "--remove")[:2] == (0, "m@best is removed (was v1)\n")

    assert filled.aliases("m") == {}
    assert [path.read_text()[:5] for path in filled.root.glob("trash/*/best")] == ["v0001"]
    assert run("alias", "m", "best", "--remove")[0] == 4
    assert run("alias", "../m", "best", "--remove")[0] == 4


def test_ls_says_that_something_cannot_be_read(run, filled):
    manifest = filled.root / "models/m/v0001/manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{")

    code, out, error = run("ls")

    assert (code, error) == (0, "1 more cannot be read; align registry doctor lists the reasons\n")
    assert "m@v1" not in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("alias", "m", "latest", "v1"), 2, "this alias is taken"),
        (("alias", "m", "best", "newest"), 2, "no version; write v1"),
        (("alias", "m", "best", "v9"), 4, "no such version"),
        (("alias", "n", "best", "v1"), 4, "no such name"),
        (("show", "n"), 4, "no such name"),
        (("verify", "m@v9"), 4, "no such version"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(run, words, code, message):
    found, out, error = run(*words)

    assert (found, out) == (code, "")
    assert message in error
    assert error.count("\n") == 1


def test_verify_counts_what_is_whole_and_fails_on_damage(run, filled):
    assert run("verify")[:2] == (0, "2 versions verified: every file, link and alias is as it was committed\n")
    assert run("verify", "m")[1].startswith("m: verified")
    weights = filled.root / "models/m/v0001/adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[::-1])

    code, out, error = run("verify")

    assert code == 4
    assert out.count("\n") == 1
    assert "adapter_model.safetensors" in out
    assert error.startswith("error: verify")


def test_a_newer_registry_is_refused(tmp_path, capsys):
    (tmp_path / "FORMAT.json").write_text('{"align_registry": 2}')

    assert main(["ls", "--registry", str(tmp_path)]) == 4
    assert "update align" in capsys.readouterr().err
