"""A child process that answers one request at a time, each within bounds of computing time and memory.

Requests and answers are bytes; their meaning is for those who use them (the chat templates, the engine's prompts and
constraints). Where a system has no such bounds (Windows) there is no such process either: see `AVAILABLE`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

AVAILABLE = os.name == "posix"
_POLL_S = 0.1
"""seconds between checks whether an answer is still wanted"""


class ProcessEnded(Exception):
    """The process ended without an answer; its text is the reason, as the end of a sentence."""


class BoundedProcess:
    """`function` (module:name) in a process of its own, started by the first request and again after it was killed.

    Each request may compute for `seconds` and take `memory` bytes beyond what the process began with. `setup` is the
    first request whenever the process was started; its answer is dropped.
    """

    def __init__(self, function: str, seconds: int, memory: int, setup: bytes | None = None) -> None:
        self._function, self._setup, self._bounds = function, setup, (seconds, memory)
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], Connection, int] | None = None
        """the process, our end of its connection, and the id of the process that started it"""

    def ask(self, request: bytes, unwanted: Callable[[], bool] | None = None) -> bytes:
        """Return the answer. ProcessEnded when there is none, or when `unwanted`, asked again and again, is true."""
        with self._lock:
            if self._running is not None and self._running[2] != os.getpid():
                # After a fork the connection belongs to the parent; two that write to it would mix their requests.
                self._running[0].returncode = 0
                self._running = None
            requests = [request]
            if self._running is None:
                self._running = (*_start(self._function, *self._bounds), os.getpid())
                requests = [request] if self._setup is None else [self._setup, request]
            process, connection, _ = self._running
            try:
                return [_exchange(connection, message, unwanted) for message in requests][-1]
            except (ConnectionError, EOFError):
                self._end()
                code = process.wait()
                reason = f"ended its process ({signal.Signals(-code).name if code < 0 else f'exit {code}'})"
                if code == -signal.SIGXCPU:
                    reason = f"did not end within {self._bounds[0]} s of computing"
                raise ProcessEnded(reason) from None
            except BaseException:  # a half-read answer must not be taken for the next one's
                self._end()
                raise

    def close(self) -> None:
        """Kill the process, if it runs."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is None or running[2] != os.getpid():
            return
        process, connection, _ = running
        process.kill()
        connection.close()
        process.wait()

    def __del__(self) -> None:
        self._end()


def _exchange(connection: Connection, request: bytes, unwanted: Callable[[], bool] | None) -> bytes:
    connection.send_bytes(request)
    while unwanted is not None and not connection.poll(_POLL_S):
        if unwanted():
            raise ProcessEnded("was given up")
    return connection.recv_bytes()


def _start(function: str, seconds: int, memory: int) -> tuple[subprocess.Popen[bytes], Connection]:
    module, _, name = function.partition(":")
    ours, theirs = Pipe()
    call = f"serve({name}, {theirs.fileno()}, {seconds}, {memory})"
    script = f"from align.data.bounded_process import serve; from {module} import {name}; {call}"
    # One thread each: what libraries reserve for more would count as memory. No CUDA, no torch: only text is made.
    quiet = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    quiet |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    null: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command = [sys.executable, "-P", "-c", script]
    with theirs:
        process = subprocess.Popen(command, **null, pass_fds=[theirs.fileno()], env=os.environ | quiet)
    return process, ours


def serve(answer: Callable[[bytes], bytes], handle: int, seconds: int, memory: int) -> None:
    """Answer requests until the parent is gone; runs in the child."""
    import resource

    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides when this one ends
        signal.signal(ignored, signal.SIG_IGN)
    connection = Connection(handle)
    before = _address_space()
    while True:
        try:
            request = connection.recv_bytes()
        except (ConnectionError, EOFError):
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limits = {
            resource.RLIMIT_CORE: 0,  # the end of a process that ran out of time would be written to disk
            resource.RLIMIT_CPU: int(usage.ru_utime + usage.ru_stime) + seconds + 1,
        }
        if before is not None:
            limits[resource.RLIMIT_AS] = before + memory + 16 * len(request)
        for kind, value in limits.items():
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        connection.send_bytes(answer(request))


def _address_space() -> int | None:
    """Return the bytes of addresses this process has taken; None where the system does not report and bound them."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def without_torch() -> None:
    """Keep torch from being imported here; tokenizers and templates do without it, and start in a third of the time."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("torch", None)
