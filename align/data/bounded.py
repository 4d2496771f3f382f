"""A child process that answers one request at a time, each within bounds of computing time and memory.

Both ends of the pipe are here; what is asked and answered is for those who use them (`rendering.template_process`,
and the engine's prompts). Where a system has no such bounds (Windows) there is no such process either: see `AVAILABLE`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

AVAILABLE = os.name == "posix"

_HEAD = 8
"""bytes that hold the length of a request or an answer"""

_LOOK_MS = 100
"""milliseconds between looks at whether an answer is still wanted"""


class ProcessEnded(Exception):
    """The process ended without an answer; the text says why, as the end of a sentence."""


class BoundedProcess:
    """`function` (module:name) in a process of its own, started by the first request and again after it was killed.

    Each request may compute for `seconds` and take `memory` bytes beyond what the process began with. `setup` is
    asked before everything else whenever the process was started, and its answer dropped.
    """

    def __init__(self, function: str, seconds: int, memory: int, setup: bytes | None = None) -> None:
        self._function = function
        self._setup = setup
        self._bounds = (seconds, memory)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: bytes, unwanted: Callable[[], bool] | None = None) -> bytes:
        """Return the answer. ProcessEnded when there is none, or when `unwanted`, asked again and again, is true."""
        with self._lock:
            if fresh := not self._runs():
                self._process, self._owner = _start(self._function, *self._bounds), os.getpid()
            process = self._process
            assert process is not None
            try:
                if fresh and self._setup is not None:
                    self._exchange(process, self._setup, unwanted)
                return self._exchange(process, request, unwanted)
            except (BrokenPipeError, EOFError):
                self._end()
                raise ProcessEnded(self._why(process.wait())) from None
            except BaseException:  # a half-read answer must not be taken for the next one's
                self._end()
                raise

    def close(self) -> None:
        """Kill the process, if it runs."""
        with self._lock:
            self._end()

    def _runs(self) -> bool:
        if self._process is not None and self._owner != os.getpid():
            # After a fork the pipe belongs to the parent; two that write into one pipe would mix their requests.
            self._process.returncode = 0
            self._process = None
        return self._process is not None

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes, unwanted: Callable[[], bool] | None) -> bytes:
        assert process.stdin is not None
        process.stdin.write(len(request).to_bytes(_HEAD, "big") + request)
        process.stdin.flush()
        return self._read(process, int.from_bytes(self._read(process, _HEAD, unwanted), "big"))

    def _read(self, process: subprocess.Popen[bytes], size: int, unwanted: Callable[[], bool] | None = None) -> bytes:
        assert process.stdout is not None
        found = bytearray()
        look = select.poll()  # select() takes no descriptor beyond 1023
        look.register(process.stdout, select.POLLIN)
        while len(found) < size:
            while unwanted is not None and not look.poll(_LOOK_MS):
                if unwanted():
                    raise ProcessEnded("was given up")
            part = os.read(process.stdout.fileno(), min(size - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # what a write left in the buffer
                    stream.close()
        process.wait()

    def _why(self, code: int) -> str:
        if code == -signal.SIGXCPU:
            return f"did not end within {self._bounds[0]} s of computing"
        return f"ended its process ({signal.Signals(-code).name if code < 0 else f'exit {code}'})"

    def __del__(self) -> None:
        self._end()


def _start(function: str, seconds: int, memory: int) -> subprocess.Popen[bytes]:
    module, _, name = function.partition(":")
    script = f"from align.data.bounded import serve; from {module} import {name}; serve({name}, {seconds}, {memory})"
    # One thread each: what libraries reserve for more would count as memory. No CUDA, no torch: text alone is made.
    quiet = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    quiet |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | quiet,
    )


def serve(answer: Callable[[bytes], bytes], seconds: int, memory: int) -> None:
    """Answer requests until the parent is gone; runs in the child."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides when this one ends
        signal.signal(ignored, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    before = _address_space()
    while head := requests.read(_HEAD):
        request = requests.read(int.from_bytes(head, "big"))
        _bound(seconds, None if before is None else before + memory + 16 * len(request))
        reply = answer(request)
        answers.write(len(reply).to_bytes(_HEAD, "big") + reply)
        answers.flush()


def _bound(seconds: int, memory: int | None) -> None:
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CORE, 0)  # the end of a process that ran out of time would be written to disk
    _lower(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + seconds + 1)
    if memory is not None:
        _lower(resource.RLIMIT_AS, memory)


def _lower(kind: int, value: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int | None:
    """Bytes of addresses this process has taken; None where the system does not say, and has no bound for it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def without_torch() -> None:
    """Keep torch from being imported here; tokenizers and templates do without it, and start in a third of the time."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("torch", None)
