"""The process behind `sandbox`: a script that restricts itself and then executes a program written by a model.

Run as `python -I -S`, it imports the standard library alone and reads {program, secret, memory, seconds} as JSON from
its input. Restrictions, where the system has them: resource limits, a network namespace without devices, Landlock (no
file is written, no signal leaves), a seccomp filter (no process, no socket) and, everywhere, a Python audit hook. The
secret is written back only if the program ran to its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from typing import Any

_MAX_REASON_CHARACTERS = 200
_MAX_OPEN_FILES = 64

_REFUSED_EVENTS = (
    "ctypes.", "fcntl.", "ftplib.", "http.client.", "mmap.", "os.add_dll", "os.chflags", "os.chmod", "os.chown",
    "os.exec", "os.fork", "os.kill", "os.link", "os.lockf", "os.mkdir", "os.posix_spawn", "os.remove",
    "os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.startfile", "os.symlink", "os.system",
    "os.truncate", "os.unlink", "os.utime", "pathlib.", "pty.", "resource.", "shutil.", "signal.", "smtplib.",
    "socket.", "sqlite3.", "subprocess.", "syslog.", "tempfile.", "urllib.", "webbrowser.",
)  # fmt: skip
_REFUSED_MODULES = {"_ctypes", "_dbm", "_gdbm", "_posixshmem", "_posixsubprocess", "_socket", "ctypes", "fcntl", "pty"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# System calls by their numbers on x86-64 and on arm64 (the latter has no fork and vfork): Linux, unistd.h.
_CALLS = {
    "add_key": (248, 217), "bpf": (321, 280), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "fork": (57, None), "io_uring_setup": (425, 425), "ioprio_set": (251, 30),
    "keyctl": (250, 219), "kill": (62, 129), "mount": (165, 40), "mq_open": (240, 180), "msgget": (68, 186),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "prlimit64": (302, 261), "process_madvise": (440, 440),
    "process_vm_writev": (311, 271), "ptrace": (101, 117), "reboot": (169, 142), "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "semget": (64, 190), "setns": (308, 268), "setpriority": (141, 140), "setrlimit": (160, 164), "shmget": (29, 194),
    "socket": (41, 198), "socketpair": (53, 199), "tgkill": (234, 131), "tkill": (200, 130), "unshare": (272, 97),
    "userfaultfd": (323, 282), "vfork": (58, None),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_NO_NEW_PRIVILEGES, _DIE_WITH_PARENT, _SECCOMP = 38, 1, 22
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000


def main() -> None:
    """Read the job, restrict the process, run the program and report."""
    job = json.load(sys.stdin)
    output = os.dup(1)
    null_device = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null_device, stream)
    limit(job["memory"], job["seconds"])
    locks = ["limits", *lock_linux(), "audit"]
    sys.addaudithook(_refuse)
    reason = _run_program(job["program"])
    verdict = {"secret": job["secret"] if reason is None else "", "reason": reason or "", "locks": locks}
    os.write(output, json.dumps(verdict).encode())
    os._exit(0)


def _run_program(program: str) -> str | None:
    """Run a program; returns why it failed, or None."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "program"})
    except BaseException as error:  # a program that ends itself has not passed either
        return f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARACTERS]
    return None


def limit(memory: int, seconds: int) -> None:
    """Limit memory in bytes and CPU time in seconds; no written files, core dumps or other processes."""
    limits = {"AS": memory, "CPU": seconds, "FSIZE": 0, "NOFILE": _MAX_OPEN_FILES, "CORE": 0, "NPROC": 1}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":  # macOS has RLIMIT_AS by name and takes no value for it
                raise


def lock_linux() -> list[str]:
    """Apply the kernel's restrictions; returns the names of those that took effect."""
    if sys.platform != "linux":
        return []
    kernel = ctypes.CDLL(None, use_errno=True)
    kernel.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    kernel.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    locks = {"network": _own_network, "landlock": _landlock, "seccomp": _filter_calls}
    return [name for name, lock in locks.items() if lock(kernel)]


def _own_network(kernel: Any) -> bool:
    """Enter a network namespace without devices, as a user without rights outside."""
    return any(kernel.unshare(flags) == 0 for flags in (_NEW_USER | _NEW_NETWORK | _NEW_IPC, _NEW_NETWORK | _NEW_IPC))


def _landlock(kernel: Any) -> bool:
    """Give up writing, creating, removing and executing files, connections, and signals to other processes."""
    version = kernel.syscall(444, None, 0, 1)
    if version < 1:
        return False
    files = 0x1FF3 | (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0)
    rights = (ctypes.c_uint64 * 3)(files, 0b11, 0b11)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = kernel.syscall(444, rights, size, 0)
    return rules >= 0 and kernel.syscall(446, rules, 0) == 0


def _filter_calls(kernel: Any) -> bool:
    """Install a seccomp filter: calls of the table fail with EPERM, calls of another architecture kill the process."""
    machine = _ARCHITECTURES.get(platform.machine())
    if machine is None:
        return False
    column, architecture = machine
    load, equal, greater, return_ = 0x20, 0x15, 0x35, 0x06
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (return_, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(greater, 0, 1, 0x40000000), (return_, 0, 0, refuse)]
    for number in (numbers[column] for numbers in _CALLS.values()):
        if number is not None:
            steps += [(equal, 0, 1, number), (return_, 0, 0, refuse)]
    steps.append((return_, 0, 0, allow))
    filters = (_Step * len(steps))(*(_Step(*step) for step in steps))
    return kernel.prctl(_SECCOMP, 2, ctypes.byref(_Program(len(steps), filters)), 0, 0) == 0


class _Step(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.POINTER(_Step)))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse an event as the audit hook, which cannot be removed."""
    if event == "open":
        flags = arguments[2]
        refused = not isinstance(flags, int) or bool(flags & _WRITING)
    elif event == "import":
        refused = arguments[0] in _REFUSED_MODULES
    else:
        refused = event.startswith(_REFUSED_EVENTS)
    if refused:
        raise PermissionError(f"{event} {arguments[:1]} is not allowed here")


if __name__ == "__main__":
    main()
