"""Running what a model wrote: one program, one process that is locked up and killed, one verdict.

`confined_program` runs there and reports its restrictions. It keeps a program from the network, from files, from
other processes and from using up the machine; it does not keep a program written for it from forging its verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from align.errors import MachineError

_SCRIPT = Path(__file__).with_name("confined_program.py")
_LONGEST_PROGRAM = 200_000
_LONGEST_VERDICT = 4096


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may use."""

    seconds: int = 3
    """of computing; as many as HumanEval's published script allows by the clock"""
    wall_seconds: float = 10.0
    """until it is killed, whatever it waits for"""
    memory: int = 512 << 20
    """bytes"""


@dataclass(frozen=True)
class ProgramOutcome:
    """How a program ended."""

    passed: bool
    reason: str
    """why it did not pass, in a few words"""
    locks: tuple[str, ...] = ()
    """what locked it up, as far as it lived to tell: limits, network, landlock, seccomp, audit"""


def run_program(program: str, limits: ProgramLimits | None = None) -> ProgramOutcome:
    """Whether a program ran to its end without an exception; raises MachineError where processes have no limits."""
    if os.name != "posix":
        raise MachineError("code execution: it needs the resource limits of Linux or macOS; score on such a machine")
    if len(program) > _LONGEST_PROGRAM:
        return ProgramOutcome(False, "the program is too long")
    limits = limits or ProgramLimits()
    secret = secrets.token_hex(16)
    asked = {"program": program, "secret": secret, "memory": limits.memory, "seconds": limits.seconds}
    with tempfile.TemporaryDirectory(prefix="align-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            said = _talk(process, json.dumps(asked).encode(), time.monotonic() + limits.wall_seconds)
        finally:
            _end(process)
    return _verdict(said, secret, process.returncode)


def locks_here() -> tuple[str, ...]:
    """What locks a program up on this machine: `limits` and `audit` everywhere, the rest where the kernel has it."""
    return run_program("").locks


def _talk(process: subprocess.Popen[bytes], asked: bytes, deadline: float) -> bytes | None:
    """What the process answers; None if it does not before the deadline."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(asked)
        process.stdin.close()
    except BrokenPipeError:
        return b""
    said = b""
    while len(said) <= _LONGEST_VERDICT:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(process.stdout.fileno(), _LONGEST_VERDICT)
        if not part:
            break
        said += part
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing it started is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _verdict(said: bytes | None, secret: str, code: int) -> ProgramOutcome:
    if said is None:
        return ProgramOutcome(False, "timed out")
    try:
        verdict = json.loads(said)
        passed, reason, locks = verdict["secret"] == secret, str(verdict["reason"]), tuple(verdict["locks"])
    except (ValueError, TypeError, KeyError):
        return ProgramOutcome(
            False, "timed out" if code in (-signal.SIGXCPU, -signal.SIGKILL) and not said else "no verdict"
        )
    return ProgramOutcome(passed, reason if passed or reason else "no verdict", locks)
