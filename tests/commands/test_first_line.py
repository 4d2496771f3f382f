"""The first line of every command that loads a model: before the libraries, and without a trace of the spinner."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Ends at the first thing that is written, and says whether torch was imported by then.
_STOP_AT_FIRST_WRITE = """
import os, runpy, sys
class First:
    encoding = "utf-8"
    def write(self, text):
        os.write(1, f"{'torch' in sys.modules} {text}".encode())
        os._exit(0)
    def flush(self): pass
    def isatty(self): return False
sys.stdout = sys.stderr = First()
name, *sys.argv[1:] = sys.argv[1:]
runpy.run_module("align." + name, run_name="__main__")
"""

COMMANDS = {
    "sft": ["model={base}", "data={data}", "name=x"],
    "pretrain": ["data={data}", "name=x"],
    "ppo": ["model={base}", "data={data}", "name=x", "rewards=[{{name: length, args: {{target: 3}}}}]"],
    "generate": ["{base}", "hello"],
    "evaluate": ["{base}", "--data", "{data}"],
    "serve": ["{base}"],
    "compare": ["{base}", "another"],
    "quickstart": [],
    "quickstart real": ["--real"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_is_written_before_torch_is_imported(command, tiny_base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    words = [word.format(base=tiny_base, data=data) for word in COMMANDS[command]]

    done = subprocess.run(
        [sys.executable, "-c", _STOP_AT_FIRST_WRITE, command.split()[0], *words, "--registry", str(tmp_path / "r")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip

    assert done.stdout.startswith("False "), done
    assert (str(tiny_base) in done.stdout) == any("{base}" in word for word in COMMANDS[command])


def test_what_is_no_terminal_gets_one_plain_line():
    script = "from align.waiting import waiting\nwith waiting('loading'): print('found')"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)

    assert (done.stdout, done.stderr) == ("found\n", "loading\n")


def test_an_answer_on_standard_output_is_all_there_is(tiny_base, tmp_path):
    words = [str(tiny_base), "hello", "--max_new_tokens", "3", "--registry", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "align.generate", *words], capture_output=True, text=True, cwd=ROOT, check=True
    )

    assert "loading" not in done.stdout
    assert done.stderr.startswith(f"loading {tiny_base}\n")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.stderr)


def _screen(written: bytes) -> list[str]:
    """The lines that stand on a terminal after so much was written to it."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[?\d;]*[A-Za-z]|\r|\n)", written.decode()):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.startswith("\x1b["):
            if part.endswith("A"):
                row = max(0, row - int(part[2:-1] or 1))
            elif part.endswith("K"):
                lines[row] = ""
        elif part != "\r":
            lines[row] += part
    return lines


def test_the_spinner_leaves_nothing_on_a_terminal():
    script = (
        "import time\nfrom align.waiting import waiting\nprint('first')\n"
        "with waiting('loading libraries'):\n    time.sleep(0.4)\n    print('meanwhile')\n    time.sleep(0.2)\n"
        "print('last')"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=theirs, stderr=theirs, cwd=ROOT, env=environment
    ) as child:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side has ended
                break
            if not part:
                break
            written += part
    os.close(ours)

    assert child.returncode == 0
    assert b"loading libraries" in written
    assert written.rstrip().rfind(b"\x1b[?25h") > written.rfind(b"\x1b[?25l")  # the cursor is back
    assert [line for line in _screen(written) if line] == ["first", "meanwhile", "last"]
