"""Real training processes without the price of their imports: one process imports everything once and forks each run.

A forked run is a process like any other: it has its own memory and signals, and SIGKILL ends it as a power cut would.
Run as a program this file is the process that forks; imported, it is what talks to it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALL = ("align.sft", "align.pretrain", "align.reward", "align.dpo", "align.kto", "align.ppo")
HEAVY = (
    "datasets", "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.PngImagePlugin", "PIL.JpegImagePlugin",
    "PIL.GifImagePlugin", "peft.tuners.lora", "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.llama.modeling_llama", "torch.utils.data", "accelerate", "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.reward_trainer", "align.training.loop",
    "align.training.register", "align.models.adapters", "align.models.heads", "align.models.scratch", "align.data",
)  # fmt: skip


@dataclass
class Ended:
    """How a run ended: its exit code (minus the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str


class Warm:
    """Starts runs; `folder` keeps what they write to their output."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip

    def start(self, stage: str, words: list[str], **plan: Any) -> Started:
        """Start `align STAGE WORDS`.

        `plan` may hold `signal` with `at_step` (a logged step) or with `at_call` and `count` (before the count-th call
        of a function, by its dotted name), `then` (another such plan), `memory` (bytes it may allocate beyond what it
        starts with), `environment` (variables to set) and `out` (a pipe to write to instead of a file).
        """
        self._count += 1
        out, err = (self._folder / f"{self._count}.{kind}" for kind in ("out", "err"))
        out = plan.pop("out", out)
        pid = self._ask(ask="start", stage=stage, words=words, plan=plan, out=str(out), err=str(err))
        return Started(self, pid, out, err)

    def run(self, stage: str, words: list[str], **plan: Any) -> Ended:
        """Start a run and wait for its end."""
        return self.start(stage, words, **plan).wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: Any) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass
class Started:
    """A run under way."""

    warm: Warm
    pid: int
    out: Path
    err: Path

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        code = self.warm._ask(ask="wait", pid=self.pid)
        return Ended(code, self.out.read_text() if self.out.is_file() else "", self.err.read_text())


def serve() -> None:
    """Answer requests until nobody can ask any more."""
    for name in HEAVY + ALL:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    # What is imported lives for ever: a forked run need not walk, and so copy, it when it collects garbage.
    gc.collect()
    gc.freeze()
    # Runs write to their own files; only answers go to whoever asked.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["ask"] == "start":
            answer = os.fork() or _run(request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
        answers.write(f"{answer}\n")
        answers.flush()


def _run(request: dict[str, Any]) -> int:
    """The life of a forked run; it never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
        _arrange(**request["plan"])
        from align.training.command import main

        code = main(importlib.import_module(f"align.{request['stage']}").STAGE, request["words"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_LOG_STEP = "align.training.run_log.RunLog.write"


def _arrange(
    *, memory: int = 0, then: dict[str, Any] | None = None, environment: dict[str, str] | None = None, **when: Any
) -> None:
    os.environ.update(environment or {})
    if when:
        _interrupt(**when)
    if then:
        _interrupt(**then)
    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _interrupt(
    *, signal: int, at_step: int = 0, at_call: str = "align.training.run_log.RunLog.write", count: int = 1
) -> None:
    """Let the process send itself a signal: after a step is logged, or before a call."""
    path, _, name = at_call.rpartition(".")
    owner = _find(path)
    function = getattr(owner, name)
    calls: list[Any] = []

    def wrapped(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        if not at_step and len(calls) == count:
            os.kill(os.getpid(), signal)
        result = function(*arguments, **more)
        if at_step and arguments[1] == at_step:
            os.kill(os.getpid(), signal)
        return result

    setattr(owner, name, wrapped)


def _find(dotted: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        path, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(path), name)


if __name__ == "__main__":
    serve()
