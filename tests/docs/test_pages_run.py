"""The commands of the pages, run as they stand: on a world that trained for two steps, the tutorial on a tiny base."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import PAGES, ROOT, commands, write_recipe_files

from align.__main__ import STAGES
from align.completion import module_of
from align.quickstart import plan_steps
from align.registry import open_registry
from align.training.command import main as run_stage_main
from align.training.command import run_stage
from align.world.write import write_world

STANDS_FOR = {
    "Qwen/Qwen3-0.6B": "world-base",
    "smollm2": "world-base",
    "HELD_OUT": "held_out.jsonl",
    "FILE": "my_chats.jsonl",
    "REF": "world-sft",
}
"""words that a reader replaces"""

IN_ORDER = [
    "README.md",
    *(f"docs/{page}.md" for page in ("data", "registry", "evaluation", "comparing", "serving", "index")),
]
SERVES = ("compare", "serve")
NEEDS_MORE = ("examples/", "align registry push", "align registry base", "align registry add", "align quickstart")
"""commands that need a hub, a file or package, a base that has moved, or minutes: each has tests elsewhere"""


def words_of(command: str, number: int, stand_ins: dict[str, str]) -> list[str]:
    """Return a command's name and arguments, with a folder of its own in the place of DIR."""
    words = shlex.split(command)[1:]
    for name, stand_in in {**stand_ins, "DIR": f"made-{number}"}.items():
        words = [re.sub(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])", stand_in, word) for word in words]
    return words


def run_page(page: str, stand_ins: dict[str, str], settings: tuple[str, ...], capsys) -> set[str]:
    """Run the commands of a page in their order and return the names of those that ran."""
    ran = set()
    for number, command in enumerate(commands(page, optional=False)):
        if any(part in command for part in NEEDS_MORE):
            continue
        name, *words = words_of(command, number, stand_ins)
        code = (
            serve_and_stop(name, words)
            if name in SERVES and "--print-vllm" not in words
            else run(name, words, settings)
        )
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.out}\n{printed.err}"
        ran.add(name)
    return ran


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a registry in which every model of the small world was trained for two steps."""
    folder = tmp_path_factory.mktemp("reader")
    registry = open_registry(str(folder / "align_registry"))
    write_world(registry.root / "world", 0)
    for step in plan_steps(0):
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
@pytest.mark.timeout(1200)
def test_the_commands_of_the_pages_run_in_their_order(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # a chat on the terminal ends at once
    ran = set()

    for page in IN_ORDER:
        ran |= run_page(page, STANDS_FOR, ("max_steps=2", "logging_steps=1", "max_length=256"), capsys)

    assert ran >= {"sft", "dpo", "generate", "data", "registry", "evaluate", "compare", "arena", "serve", "completion"}


def run(name: str, words: list[str], settings: tuple[str, ...]) -> int:
    """Run a command in this process; the stages learn for two steps only."""
    module = importlib.import_module(module_of(name))
    if "--help" in words:
        return 0
    if name in STAGES and words[0] != "score":
        return run_stage_main(module.STAGE, [*words, *settings])
    return module.main(words)


def serve_and_stop(name: str, words: list[str]) -> int:
    """Start a server, wait until it says where it is, and end it as its user would."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "align", name, *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if "http://" in line:
                process.terminate()
        return 0 if process.wait(300) in (0, -15, 143) else process.returncode


def write_chats(path: Path) -> None:
    """Write the export of a help desk, one message a row, with an address now and then."""
    goods = ("kettle", "lamp", "chair", "desk", "radio")
    answers = ("It left on day {}.", "It costs {} euros.", "Send it back with label {}.", "Order {} is on its way.")
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["ticket", "sender", "message", "created_at"])
        for ticket in range(60):
            table.writerow([ticket, "customer", f"What about my {goods[ticket % 5]}, order {ticket}?", "2026-10-05"])
            answer = answers[ticket % 4].format(ticket) + " Write to anna@example.org." * (ticket % 20 == 0)
            table.writerow([ticket, "agent", answer, "2026-10-05"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_runs_on_a_tiny_model(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    registry = open_registry(tmp_path / "align_registry")
    write_chats(tmp_path / "chats.csv")
    (tmp_path / "support.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGES["docs/tutorial.md"], re.S)[1])
    registry.votes_dir.mkdir(parents=True)
    (registry.votes_dir / "shard.jsonl").write_text("".join(json.dumps(vote(n)) + "\n" for n in range(8)))
    settings = ("max_steps=2", "logging_steps=1")

    ran = run_page("docs/tutorial.md", {"Qwen/Qwen3-0.6B": str(tiny_base), ":limit=100": ":limit=4"}, settings, capsys)

    assert ran == {"data", "sft", "registry", "generate", "evaluate", "compare", "arena", "dpo", "serve"}
    assert (tmp_path / "support.html").is_file()
    assert registry.resolve("support-dpo@champion").version == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipes_run_on_a_tiny_model(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_recipe_files(tmp_path)
    settings = ("max_steps=2", "logging_steps=1", "on_long=drop")

    assert run_page("docs/recipes.md", {"smollm2": str(tiny_base)}, settings, capsys) == {"sft", "evaluate", "generate"}


def test_the_python_page_runs(tiny_base, tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    sweep, load = re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.S)
    (tmp_path / "pairs").mkdir()
    for part, tickets in {"train": range(16), "eval": range(16, 24)}.items():
        rows = [{"prompt": f"Where is parcel {n}?", "chosen": f"On day {n}.", "rejected": "No idea."} for n in tickets]
        (tmp_path / "pairs" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = 'name="my-dpo", max_steps=2, '
    assert run_stage_main(importlib.import_module("align.sft").STAGE, sft_words(tiny_base, tmp_path)) == 0

    exec(compile(sweep.replace('name="my-dpo", ', short), "docs/python.md", "exec"), {})
    exec(compile(load.replace("Qwen/Qwen3-0.6B", str(tiny_base)), "docs/python.md", "exec"), {})

    assert open_registry(None).resolve("my-dpo@best").version in (1, 2, 3)
    assert "my-dpo@v3 0.3" in capsys.readouterr().out


def sft_words(base: Path, folder: Path) -> list[str]:
    chats = [{"prompt": f"Where is parcel {n}?", "completion": f"On day {n}."} for n in range(8)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return [f"model={base}", f"data={folder / 'chats.jsonl'}", "name=my-sft", "max_steps=2"]
