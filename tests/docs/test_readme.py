"""The README's commands, run as they stand, on a world whose models trained for two steps."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from align.__main__ import COMMANDS
from align.quickstart import plan
from align.registry import open_registry
from align.training.command import main as run_stage_main
from align.training.command import run_stage
from align.world import write_world

ROOT = Path(__file__).resolve().parents[2]

STANDS_FOR = {
    "Qwen/Qwen3-0.6B": "world-base",
    "HELD_OUT": "held_out.jsonl",
    "FILE": "my_chats.jsonl",
    "REF": "world-sft",
}
"""what a reader puts in the place of these words"""

SERVES = ("align.compare", "align.serve")
NEEDS_A_HUB = ("examples/", "align.registry push")
"""what these commands read or write is on a hub: their settings, and a hub that is a stand-in, have tests elsewhere"""


def commands() -> list[str]:
    """Every command of the README's shell blocks, without remarks and with what is optional left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    found = [re.sub(r" \[-.*?\]", "", line.split(" # ")[0].strip()) for line in lines]
    return [line for line in found if line.startswith("python -m align.")]


def words_of(command: str, number: int = 0) -> list[str]:
    """The module and its arguments, with a folder of its own in the place of DIR."""
    words = shlex.split(command)[2:]
    for name, stand_in in {**STANDS_FOR, "DIR": f"made-{number}"}.items():
        words = [re.sub(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])", stand_in, word) for word in words]
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a registry in which every model of the small world was trained for two steps."""
    folder = tmp_path_factory.mktemp("reader")
    registry = open_registry(str(folder / "align_registry"))
    write_world(registry.root / "world", 0)
    for step in plan(0):
        short = {"max_steps": 2, "eval_data": None}
        run_stage(step.stage, step.config.model_copy(update=short), registry)
    chats = [{"messages": [{"role": "user", "content": f"Where is parcel {n}?"},
                           {"role": "assistant", "content": f"It left on day {n}."}]} for n in range(24)]  # fmt: skip
    for name, rows in {"my_chats.jsonl": chats[:16], "held_out.jsonl": chats[16:]}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    registry.votes_dir.mkdir()
    (registry.votes_dir / "shard.jsonl").write_text("".join(json.dumps(vote(n)) + "\n" for n in range(8)))
    return folder


def vote(number: int) -> dict:
    said = {side: [{"role": "assistant", "content": f"{side} {number}"}] for side in ("a", "b")}
    return {
        "id": f"v{number}", "prompt": [{"role": "user", "content": f"Where is parcel {number}?"}], **said,
        "choice": "ab"[number % 2], "models": {"a": "world-sft@v1", "b": "world-dpo@v1"}, "mode": "blind",
        "time": "2026-11-20T10:00:00.000+00:00",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_run_in_their_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ran = []

    for number, command in enumerate(commands()):
        if any(part in command for part in NEEDS_A_HUB):
            continue
        module, *words = words_of(command, number)
        serves = module in SERVES and "--print-vllm" not in words
        code = serve_and_stop(module, words) if serves else run(module, words)
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.out}\n{printed.err}"
        ran.append(module.removeprefix("align."))

    assert {"sft", "dpo", "generate", "data", "registry", "evaluate", "compare", "arena", "serve"} == set(ran)


def run(module: str, words: list[str]) -> int:
    """Run a command in this process; the stages learn for two steps only."""
    door = importlib.import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
    if hasattr(door, "STAGE") and words[0] != "score":
        return run_stage_main(door.STAGE, [*words, "max_steps=2", "logging_steps=1", "max_length=256"])
    return door.main(words)


def serve_and_stop(module: str, words: list[str]) -> int:
    """Start a server, wait until it says where it is, and end it as its user would."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    asked = [sys.executable, "-m", module, *words, "--port", "0"]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if "http://" in line:
                process.terminate()
        return 0 if process.wait(300) in (0, -15, 143) else process.returncode


def test_the_readme_shows_every_command():
    shown = (ROOT / "README.md").read_text(encoding="utf-8")

    assert [name for name in COMMANDS if f"python -m align.{name}" not in shown] == []
