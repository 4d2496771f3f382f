"""`align serve`: what it refuses before it loads, the command for vLLM, and its orderly end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
from served_models import commit_adapter
from serving import PATIENCE, until

from align import serve
from align.errors import UsageError
from align.registry import Registry
from align.serve import read_token

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WHOLE = "roses are red violets are blue sugar is sweet and so are you"
ASK = {"messages": [{"role": "user", "content": "a poem"}], "stream": True}


def start(*words: str) -> subprocess.Popen:
    path = os.pathsep.join(map(str, (ROOT, HERE.parent, HERE)))
    return subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def status(url: str) -> int:
    """What /ready says."""
    return httpx.get(f"{url}/ready", timeout=PATIENCE, verify=False).status_code


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code and the one line after the first of a command that is not carried out."""
    code = serve.main(list(words))
    *first, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert all(line.startswith("serve: ") for line in first)
    assert len(first) <= 1
    return code, error


def test_help_comes_at_once_and_without_torch():
    script = (
        "import sys, align.serve as s\ntry: s.main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)

    assert (done.returncode, done.stderr) == (0, "")
    assert "--token-file" in done.stdout


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example"])
def test_an_address_that_others_reach_needs_a_token(models, capsys, monkeypatch, host):
    monkeypatch.delenv("ALIGN_TOKEN", raising=False)

    code, line = refused(capsys, "stone", "--registry", str(models.root), "--host", host)

    assert code == 2
    assert "--token-file" in line


def test_a_name_that_others_use_needs_a_token_too(models, capsys, monkeypatch):
    monkeypatch.delenv("ALIGN_TOKEN", raising=False)

    code, line = refused(capsys, "stone", "--registry", str(models.root), "--allow-host", "models.example")

    assert code == 2
    assert "models.example: others could reach it" in line


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["warm-sfd"], 4, "did you mean warm-sft"),
        (["warm-sft", "warm-sft@v2"], 2, "the same model as warm-sft"),
        (["stone", "--port", "70000"], 2, "no such port"),
        (["stone", "--max-waiting", "0"], 2, "max_waiting=0"),
        (["stone", "--ui"], 2, "a comparison takes 2 to 4"),
        (["stone", "--token-file", "/no/such/file"], 2, "--token-file /no/such/file: cannot be read"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_loads(models, capsys, words, code, part):
    assert refused(capsys, *words, "--registry", str(models.root))[0] == code
    assert part in refused(capsys, *words, "--registry", str(models.root))[1]


def test_a_port_in_use_is_told(models, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, line = refused(capsys, "stone", "--registry", str(models.root), "--port", str(other.getsockname()[1]))

    assert code == 6
    assert "end what uses it" in line


def test_a_reward_model_is_not_served(models, capsys):
    with models.stage("judge") as staging:
        (staging.path / "config.json").write_text("{}")
        staging.commit({"stage": "reward", "kind": "reward"})

    code, line = refused(capsys, "judge", "--registry", str(models.root))

    assert code == 2
    assert "scores text" in line


def test_a_token_comes_from_a_file_or_the_environment_and_stays_there_no_longer(tmp_path):
    (tmp_path / "token").write_text("from-a-file\n")
    environment = {"ALIGN_TOKEN": "from-outside"}

    assert read_token(str(tmp_path / "token"), dict(environment)) == "from-a-file"
    assert read_token(None, environment) == "from-outside"
    assert environment == {}
    assert read_token(None, {}) is None


@pytest.mark.parametrize("text", ["", " \n", "two words", "schlüssel", "a\tb"])
def test_what_is_no_token_is_refused_without_showing_it(tmp_path, text):
    (tmp_path / "token").write_text(text)

    with pytest.raises(UsageError, match="holds no token") as caught:
        read_token(str(tmp_path / "token"), {})

    assert not text.strip() or text.strip() not in str(caught.value)


def vllm_words(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert serve.main(["--print-vllm", *words]) == 0
    return shlex.split(capsys.readouterr().out)


def after(words: list[str], option: str) -> list[str]:
    """What follows an option, up to the next one."""
    rest = words[words.index(option) + 1 :]
    return rest[: next((place for place, word in enumerate(rest) if word.startswith("--")), len(rest))]


def test_the_vllm_command_names_base_adapters_rank_and_template(models: Registry, capsys, monkeypatch):
    monkeypatch.setenv("ALIGN_TOKEN", "never-shown")
    folder = models.root / "models"

    words = vllm_words(capsys, "warm-sft", "cool-dpo@prod", "stone", "--registry", str(models.root), "--port", "9000")

    assert words[:4] == ["VLLM_API_KEY=$ALIGN_TOKEN", "vllm", "serve", str(folder / "stone" / "v0001")]
    assert "--enable-lora" in words
    assert after(words, "--served-model-name") == ["stone@v1", "stone"]
    assert after(words, "--max-lora-rank") == ["8"]
    assert after(words, "--chat-template") == [str(folder / "warm-sft" / "v0002" / "chat_template.jinja")]
    assert after(words, "--lora-modules") == [
        f"warm-sft@v2={folder}/warm-sft/v0002",
        f"warm-sft={folder}/warm-sft/v0002",
        f"cool-dpo@v1={folder}/cool-dpo/v0001",
        f"cool-dpo@prod={folder}/cool-dpo/v0001",
        f"cool-dpo={folder}/cool-dpo/v0001",
    ]
    assert after(words, "--port") == ["9000"]


def test_the_vllm_command_of_a_base_alone_has_no_adapters(models: Registry, capsys):
    words = vllm_words(capsys, "stone", "--registry", str(models.root), "--quantization", "nf4")

    assert "--enable-lora" not in words
    assert after(words, "--quantization") == ["bitsandbytes"]


def test_what_vllm_cannot_run_is_refused_with_what_to_do(models: Registry, capsys):
    commit_adapter(models, "dora-sft", 4, use_dora=True)
    capsys.readouterr()

    code, line = refused(capsys, "--print-vllm", "dora-sft", "--registry", str(models.root))

    assert code == 2
    assert "align registry merge dora-sft@v1" in line


def test_the_vllm_command_needs_no_torch(models: Registry):
    script = (
        "import sys, align.serve as s\n"
        f"code = s.main(['--print-vllm', 'warm-sft', '--registry', {str(models.root)!r}])\n"
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)

    assert (done.returncode, done.stderr) == (0, "")


def read_stream(url: str, model: str, started: threading.Event, pieces: list[str]) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=PATIENCE) as client:
        for chunk in client.chat.completions.create(model=model, seed=1, max_tokens=200, **ASK):
            pieces.append(chunk.choices[0].delta.content or "")
            started.set()
        pieces.append("[end]")


def end_while_streaming(process: subprocess.Popen, url: str, model: str) -> tuple[list[str], str, str]:
    """SIGTERM in the middle of a stream; what the stream brought until its end, and what the process wrote."""
    started, pieces = threading.Event(), list[str]()
    reader = threading.Thread(target=read_stream, args=(url, model, started, pieces))
    reader.start()
    assert started.wait(PATIENCE)
    process.send_signal(signal.SIGTERM)
    until(lambda: status(url) == 503)
    body = {"model": model, "messages": ASK["messages"]}
    late = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE, verify=False)
    assert late.status_code == 503
    assert "[end]" not in pieces
    out, err = process.communicate("go on\n", timeout=PATIENCE)
    reader.join(PATIENCE)
    return pieces, out, err


def test_sigterm_finishes_streams_refuses_what_is_new_and_ends_with_zero():
    process = start(str(HERE / "fake_process.py"))
    assert process.stdout is not None
    url = process.stdout.readline().strip()

    pieces, out, err = end_while_streaming(process, url, "red")

    assert "".join(pieces) == WHOLE + "[end]"
    assert (process.returncode, out, err) == (0, "ended\n", "")


def test_a_second_signal_ends_at_once():
    process = start(str(HERE / "fake_process.py"))
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    body = {"model": "red", **ASK}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE, verify=False) as reply:
        next(reply.iter_raw())
        process.send_signal(signal.SIGINT)
        until(lambda: status(url) == 503)
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)

    assert "Traceback" not in process.communicate()[1]


@pytest.mark.slow
def test_the_command_loads_serves_and_ends_in_order(models: Registry):
    words = ["warm-sft", "stone", "--port", "0", "--registry", str(models.root), "--debug"]
    words += ["--drain-seconds", str(PATIENCE)]
    process = start(str(HERE / "held_process.py"), *words)
    assert process.stdout is not None
    url = re.search(r"http://\S+:\d+", process.stdout.readline())[0]
    assert httpx.get(f"{url}/health", timeout=PATIENCE, verify=False).status_code == 200
    until(lambda: status(url) == 200)

    pieces, out, err = end_while_streaming(process, url, "warm-sft")

    assert pieces[-1] == "[end]"
    assert process.returncode == 0
    assert out.splitlines()[-1] == "ended in order"
    assert json.dumps(ASK["messages"][0]["content"]) not in err
    assert re.search(r"Z POST /v1/chat/completions 200 seconds=.* model=warm-sft@v2", err)


@pytest.mark.slow
def test_models_that_cannot_be_loaded_end_the_command_with_their_error(models: Registry):
    commit_adapter(models, "broken-sft", 5)
    weights = models.root / "models" / "broken-sft" / "v0001" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)

    process = start("-m", "align.serve", "broken-sft", "--port", "0", "--registry", str(models.root))

    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 4
    first, error = err.splitlines()
    assert first.startswith("serve: broken-sft")
    assert error.startswith("error: broken-sft@v1")
