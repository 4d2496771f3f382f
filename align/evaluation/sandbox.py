"""Execution of model output: one program in one restricted process that is killed afterwards.

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
_MAX_PROGRAM_CHARACTERS = 200_000
_MAX_OUTPUT_BYTES = 4096


@dataclass(frozen=True)
class ProgramLimits:
    """Resources of a program."""

    seconds: int = 3
    """of CPU time; HumanEval's script allows as many of wall time"""
    wall_seconds: float = 10.0
    """until it is killed"""
    memory: int = 512 << 20
    """bytes"""


@dataclass(frozen=True)
class ProgramOutcome:
    """The outcome of a program."""

    passed: bool
    reason: str
    """why it did not pass"""
    locks: tuple[str, ...] = ()
    """restrictions it reported: limits, network, landlock, seccomp, audit"""


def run_program(program: str, limits: ProgramLimits | None = None) -> ProgramOutcome:
    """Run a program and return whether it ended without an exception; MachineError where processes have no limits."""
    if os.name != "posix":
        raise MachineError("code execution: it needs the resource limits of Linux or macOS; score on such a machine")
    if len(program) > _MAX_PROGRAM_CHARACTERS:
        return ProgramOutcome(False, "the program is too long")
    limits = limits or ProgramLimits()
    secret = secrets.token_hex(16)
    job = {"program": program, "secret": secret, "memory": limits.memory, "seconds": limits.seconds}
    with (
        tempfile.TemporaryDirectory(prefix="align-code-") as folder,
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            output = _exchange(process, json.dumps(job).encode(), time.monotonic() + limits.wall_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing it started is left
                os.killpg(process.pid, signal.SIGKILL)
    if output is None:
        return ProgramOutcome(False, "timed out")
    try:
        verdict = json.loads(output)
        passed, reason, locks = verdict["secret"] == secret, str(verdict["reason"]), tuple(verdict["locks"])
    except (ValueError, TypeError, KeyError):
        killed = process.returncode in (-signal.SIGXCPU, -signal.SIGKILL) and not output
        return ProgramOutcome(False, "timed out" if killed else "no verdict")
    return ProgramOutcome(passed, reason if passed or reason else "no verdict", locks)


def available_locks() -> tuple[str, ...]:
    """Return the restrictions of this machine: `limits` and `audit` everywhere, others where the kernel has them."""
    return run_program("").locks


def _exchange(process: subprocess.Popen[bytes], job: bytes, deadline: float) -> bytes | None:
    """Send the job and return the process's output; None after the deadline."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        return b""
    output = b""
    while len(output) <= _MAX_OUTPUT_BYTES:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        chunk = os.read(process.stdout.fileno(), _MAX_OUTPUT_BYTES)
        if not chunk:
            break
        output += chunk
    return output
