"""What a model wrote is run locked up: hostile programs end, fail and leave nothing behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from align.data import load_records
from align.errors import DataError
from align.evaluation import confined_program, sandbox
from align.evaluation.request import EvaluationRequest, prepare_data
from align.evaluation.sandbox import ProgramLimits, run_program
from align.evaluation.scorers import scorer_named
from align.evaluation.scorers.humaneval import complete_program
from align.schema import Record, user

OVER = 60
"""seconds within which anything that was limited to two is over, on a busy machine too"""
AMPLE = ProgramLimits(seconds=60, wall_seconds=300.0)
"""for what is to pass however busy the machine is"""
SHORT = ProgramLimits(seconds=1, wall_seconds=2.0, memory=256 << 20)
PROMPT = 'def twice(number):\n    """The number times two."""\n'
PROBLEM = Record(
    prompt=[user(PROMPT)],
    meta={"entry_point": "twice", "test": "def check(candidate):\n    assert candidate(2) == 4\n"},
)


@pytest.fixture(autouse=True)
def ample(monkeypatch):
    """What is run without limits of its own has ample time."""
    monkeypatch.setattr(sandbox, "ProgramLimits", lambda: AMPLE)


HOSTILE = {
    "a wrong answer": "assert 1 == 2",
    "no program": "def",
    "a zero byte": "x = '\0'",
    "half a character": "x = '\ud800'",
    "nesting": "x = " + "(" * 5000 + ")" * 5000,
    "recursion": "def f(): return f()\nf()",
    "an end that looks good": "import os\nos._exit(0)",
    "another one": "raise SystemExit(0)",
    "a fork": "import os\nwhile True: os.fork()",
    "a fork by its other name": "import posix\nwhile True: posix.fork()",
    "a process": "import subprocess\nsubprocess.run(['true'])",
    "a process by its inner name": "import _posixsubprocess",
    "a shell": "import os\nos.system('true')",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', 80))",
    "an inner socket": "import _socket",
    "the libraries of C": "import ctypes\nctypes.CDLL(None).fork()",
    "a file": "open('here', 'w')",
    "a folder": "import os\nos.mkdir('here')",
    "its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "its parent": "import os\nos.kill(os.getppid(), 9)",
    "its group": "import os\nos.killpg(0, 9)",
    "all memory": "x = [0] * 10**9",
    "more and more memory": "x = []\nwhile True: x.append('a' * 10**6)",
    "a program too long": "x = 1\n" * 100_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_program_fails_and_is_over(kind):
    start = time.monotonic()

    outcome = run_program(HOSTILE[kind], SHORT)

    assert not outcome.passed
    assert outcome.reason
    assert time.monotonic() - start < OVER


def test_a_program_that_ends_well_has_passed_and_says_what_locked_it():
    program = "import collections, hashlib, math, re, typing\nassert hashlib.md5(b'').hexdigest()"

    outcome = run_program(program)

    assert (outcome.passed, outcome.reason) == (True, "")
    assert {"limits", "audit"} <= set(outcome.locks)


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(99)", "9 ** 9 ** 9"])
def test_a_program_without_end_is_stopped(program):
    start = time.monotonic()

    outcome = run_program(program, SHORT)

    assert (outcome.passed, outcome.reason) == (False, "timed out")
    assert time.monotonic() - start < OVER


def test_what_a_program_writes_is_not_its_verdict_and_fills_no_memory():
    flood = (
        "import os\nwhile True:\n  for stream in range(16):\n    try: os.write(stream, b'x' * 65536)\n"
        "    except OSError: pass\n"
    )

    assert run_program(flood, SHORT).reason in ("no verdict", "timed out")
    assert not run_program('print(\'{"secret": "", "reason": "", "locks": []}\')\nimport os; os._exit(0)', SHORT).passed


def test_nothing_outside_is_touched(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    attempts = [f"open({str(victim)!r}, 'w')", f"import os\nos.remove({str(victim)!r})"]
    attempts += [f"import os\nos.rename({str(victim)!r}, 'x')", f"import os\nos.truncate({str(victim)!r}, 0)"]
    attempts += [f"import os\nos.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)"]

    outcomes = [run_program(program, SHORT) for program in attempts]

    assert not any(outcome.passed for outcome in outcomes)
    assert victim.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [victim]


def test_an_evaluation_says_whether_and_how_code_was_run(tmp_path):
    row = {"task_id": "Example/0", "prompt": PROMPT, **PROBLEM.meta}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = f"humaneval:source={tmp_path / 'rows.jsonl'}"

    refused, allowed = prepare_data(EvaluationRequest(data)), prepare_data(EvaluationRequest(data, allow_code=True))

    assert (refused.completion_scorers, [each.name for each in allowed.completion_scorers]) == ((), ["humaneval"])
    assert any("not scored without --allow-code-execution" in note for note in refused.notes)
    assert any("executed model output, restricted by limits, " in note for note in allowed.notes)


def test_a_program_knows_neither_environment_nor_arguments(monkeypatch):
    monkeypatch.setenv("A_SECRET_TOKEN", "s3cret")

    outcome = run_program("import os\nassert 'A_SECRET_TOKEN' not in os.environ, os.environ")

    assert outcome.passed, outcome.reason


def test_no_server_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", SHORT)

        assert not outcome.passed
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


# Without Python's own hook, as if a program had found a way around it: the kernel alone must refuse.
AROUND_THE_HOOK = """
import importlib.util, os, socket, sys, threading
spec = importlib.util.spec_from_file_location("confined", sys.argv[1])
confined = importlib.util.module_from_spec(spec)
spec.loader.exec_module(confined)
confined.limit(512 << 20, 5)
print("locks", *confined.lock_linux())

def attempt(name, action):
    try:
        action()
    except (OSError, RuntimeError):
        return
    print("did", name)

attempt("fork", os.fork)
attempt("process", lambda: os.posix_spawn("/bin/true", ["true"], {}))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("socket", socket.socket)
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("thread", threading.Thread(target=int).start)
attempt("write", lambda: open(sys.argv[2], "w"))
attempt("append", lambda: open(sys.argv[2], "a"))
attempt("remove", lambda: os.remove(sys.argv[2]))
attempt("folder", lambda: os.mkdir(sys.argv[2] + "-folder"))
attempt("nice", lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the locks of the Linux kernel")
def test_the_kernel_refuses_what_gets_around_the_audit_hook(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", AROUND_THE_HOOK, confined_program.__file__, str(victim)],
        capture_output=True,
        text=True,
        timeout=300,
    )

    locks, *did = done.stdout.splitlines()
    if not {"landlock", "seccomp"} <= set(locks.split()):
        pytest.skip(f"this kernel gives {locks}")
    assert (did, done.returncode) == ([], 0), done.stderr
    assert victim.read_text() == "mine"


def test_no_process_is_left_behind():
    before = _children()

    for kind in ("a fork", "a process", "more and more memory"):
        run_program(HOSTILE[kind], SHORT)

    assert _children() == before


def _children() -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize(
    "completion",
    [
        "    return 2 * number\n",
        "return 2 * number",
        "    return 2 * number\n\n\ndef other():\n    broken(",
        "    if number:\n        return 2 * number\n    return 0\nprint(twice(",
        "if number:\n        return 2 * number\n    return 0",
        "Sure!\n```python\ndef twice(number):\n    return 2 * number\n```\nThat is all.",
        "```python\nimport math\n\ndef twice(number):\n    return 2 * number\n\nprint(twice(3))\n```",
        "```\n    return 2 * number\n```",
        "def twice(number):\r\n    return 2 * number\r\n",
        "First:\n```\nexample = 1\n```\nthen\n```python\ndef twice(number):\n    return 2 * number",
    ],
)
def test_a_right_function_passes_however_it_is_handed_over(completion):
    assert scorer_named("humaneval")(PROBLEM, completion) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "    return number\n",
        "I cannot write code.",
        "```python\n```",
        "def check(candidate):\n    pass",
        "return 4 " * 999,
    ],
)
def test_a_wrong_function_fails(completion):
    assert scorer_named("humaneval")(PROBLEM, completion) == {"pass@1": 0.0}


def test_a_helper_above_the_function_is_kept():
    prompt = 'def one():\n    return 1\n\n\ndef twice(number):\n    """Two."""\n'

    assert complete_program(prompt, "    return 2 * number", "twice") == prompt + "    return 2 * number\n"
    assert complete_program(prompt, "def twice(n):\n    return n", "twice").startswith(prompt)


@pytest.mark.parametrize("meta", [{"entry_point": "a b"}, {"entry_point": 3}, {"test": 3}])
def test_a_row_without_name_or_tests_is_told(meta):
    record = Record(prompt=PROBLEM.prompt, meta=PROBLEM.meta | meta, source="a.jsonl", line=4)

    with pytest.raises(DataError, match=r"entry_point and test of a.jsonl:4 are no name and no text"):
        scorer_named("humaneval")(record, "x")


def test_only_the_scorer_of_code_executes_code():
    assert scorer_named("humaneval").executes_code
    assert not scorer_named("gsm8k").executes_code


@pytest.mark.slow
def test_every_published_solution_passes_and_none_without_it(real_data):
    records = load_records(f"humaneval:source={real_data}/eval/humaneval__HumanEval.jsonl.gz").records
    score = scorer_named("humaneval")

    assert all(score(record, record.meta["canonical_solution"])["pass@1"] for record in records)
    assert not any(score(record, "    return None\n")["pass@1"] for record in records[:40])
