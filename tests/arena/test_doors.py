"""`align.generate` and `align.compare` as commands."""

from __future__ import annotations

import fcntl
import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from urllib.request import urlopen

import pytest

from align import compare, generate
from align.registry import Registry

FIRST, SECOND, BASE = "crimson-sft", "azure-dpo", "granite-base"


def run(*arguments: str, stdin: str | None = None, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", *arguments], **pipes, **options)


@pytest.mark.parametrize("door", ["align.generate", "align.compare"])
def test_help_is_instant_and_loads_no_torch(door):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\ntry:\n    runpy.run_module('{door}', run_name='__main__')\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'transformers', 'gradio', 'peft'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    assert "--max_new_tokens" in process.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of computing, for a busy machine may be slow; a quarter of a second here, and ten with torch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_one_prompt_streams_the_engines_text(contest: Registry, engine, capsys):
    from align.engine.protocol import Row, Sampling

    arguments = [FIRST, "the quick brown fox", "--registry", str(contest.root), "--seed", "3", "--max_new_tokens", "20"]
    code = generate.main([*arguments, "--temperature", "1"])

    row = Row(f"{FIRST}@v1", [{"role": "user", "content": "the quick brown fox"}], 3)
    [expected] = engine.complete([row], Sampling(temperature=1.0, max_new_tokens=20))
    assert code == 0
    assert capsys.readouterr().out == generate.printable(expected) + "\n"


def test_the_prompt_can_come_from_standard_input(contest: Registry, capsys, monkeypatch):
    arguments = ["--registry", str(contest.root), "--temperature", "0", "--max_new_tokens", "8"]
    generate.main([FIRST, "nine blue eggs", *arguments])
    said = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("nine blue eggs"))

    assert generate.main([FIRST, "-", *arguments]) == 0
    assert capsys.readouterr().out == said


def test_a_chat_remembers_its_turns_until_it_is_reset(contest: Registry, capsys, monkeypatch):
    arguments = [FIRST, "--registry", str(contest.root), "--temperature", "0", "--max_new_tokens", "12"]

    def chat(*lines: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        assert generate.main(arguments) == 0
        return capsys.readouterr().out.rstrip("\n").split("\n")

    remembered = "".join(chat("hello", "", "hello"))
    forgotten = "".join(chat("hello", "/reset", "hello", "/quit", "never read"))

    once = "".join(chat("hello"))
    assert forgotten == once + once
    assert remembered.startswith(once)
    assert remembered != forgotten


def test_an_interrupted_answer_keeps_its_text_and_exits_130(contest: Registry):
    process = run(
        "align.generate", BASE, "hello", "--registry", str(contest.root), "--max_new_tokens", "1900", "--seed", "1",
        "--temperature", "1",
    )  # fmt: skip
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # whoever does not read holds the writer up before its end
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    first = os.read(process.stdout.fileno(), 4)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)

    assert process.returncode == 130, errors
    assert first
    assert rest.endswith(b"\n")


def test_control_characters_of_a_model_never_reach_the_terminal():
    assert generate.printable("a\x1b]0;title\x07\nb\tc\x9b2J\r中") == "a�]0;title�\nb\tc�2J�中"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nobody", "hi"], 4, "nobody"),
        ([FIRST, " "], 2, "it is empty"),
        ([FIRST, "hi", "--top_p", "2"], 2, "top_p=2.0: out of range"),
    ],
)
def test_generate_says_what_is_wrong(contest: Registry, capsys, arguments, code, message):
    assert generate.main([*arguments, "--registry", str(contest.root)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([FIRST], 2, "models given: 1; a comparison takes 2 to 4; chat with one by align generate"),
        ([FIRST, f"{FIRST}@v1"], 2, "the same model as crimson-sft"),
        ([FIRST, "crimson-stf"], 4, "did you mean crimson-sft?"),
        ([FIRST, SECOND, "--host", "0.0.0.0"], 2, "ssh -L"),
        ([FIRST, SECOND, "--temperature", "-1"], 2, "temperature=-1.0: out of range"),
        ([FIRST, SECOND, "--reward_model", FIRST], 2, "is a policy, not a reward model"),
        ([FIRST, SECOND, "--prompts", "nowhere.jsonl"], 3, "nowhere.jsonl"),
    ],
)
def test_compare_says_what_is_wrong(contest: Registry, capsys, arguments, code, message):
    assert compare.main([*arguments, "--registry", str(contest.root)]) == code
    assert message in capsys.readouterr().err


def test_compare_on_a_port_in_use_exits_6_before_any_model_loads(contest: Registry, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])

        assert compare.main([FIRST, SECOND, "--port", port, "--registry", str(contest.root)]) == 6
    assert f"--port {port}" in capsys.readouterr().err


def test_compare_without_gradio_names_the_extra(contest: Registry, capsys, monkeypatch):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)

    assert compare.main([FIRST, SECOND, "--registry", str(contest.root)]) == 6
    assert 'pip install "align[app]"' in capsys.readouterr().err


def test_compare_serves_and_fills_its_review_queue_until_it_is_interrupted(contest: Registry, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the quick brown fox"}\n')
    process = run(
        "align.compare", FIRST, BASE, "--blind", "--port", "0", "--registry", str(contest.root),
        "--prompts", str(prompts), "--max_new_tokens", "4",
    )  # fmt: skip
    line = process.stdout.readline().decode()
    url = re.search(r"http://\S+", line)[0]

    with urlopen(f"{url}/config") as response:
        config = response.read()
    queue = [process.stdout.readline().decode() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)

    assert b"Chatbot".lower() in config.lower()
    assert queue[1] == "review queue: 2 of 2 answers are there\n"
    assert not any(name.encode() in config for name in (FIRST, BASE))
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
