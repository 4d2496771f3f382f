"""The errors a user can meet, each with its exit code.

A message has three parts: `what was asked: what was found; what to do`.
"""

from __future__ import annotations

import difflib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class AlignError(Exception):
    """An error that the user can act on; its text is the whole message."""

    exit_code = 1


class UsageError(AlignError):
    """The command line or the configuration cannot be carried out as written."""

    exit_code = 2


class DataError(AlignError):
    """A dataset, a file or a row is not what the stage needs."""

    exit_code = 3


class IntegrityError(AlignError):
    """A model, an adapter or the registry is not what it claims to be."""

    exit_code = 4


class DivergedError(AlignError):
    """Training produced a number that is not finite; nothing was registered."""

    exit_code = 5


class MachineError(AlignError):
    """The machine lacks what was needed: disk, memory, a port, an optional package."""

    exit_code = 6


class PreemptedError(AlignError):
    """The run was stopped from outside, saved its state and can be resumed."""

    exit_code = 75


INTERRUPTED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class StoppedError(AlignError, KeyboardInterrupt):
    """Ctrl-C ended a run; the message says what was saved."""

    exit_code = INTERRUPTED


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the hint that ends a message about an unknown name: the nearest known ones, or all of them.

    It is `" did you mean beta?"`, or `" known: a, b, c."` when none is near, or `""` when none is known.
    """
    names = list(known)
    matches = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if matches:
        return f" did you mean {' or '.join(matches)}?"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f" known: {', '.join(names[:20])}{more}." if names else ""


def shorten(value: object, width: int = 60) -> str:
    """Return a value as one short line for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def guard(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a command and turn what it raises into one line on stderr and an exit code.

    With `debug` the traceback is shown as well. Bugs, which the user cannot fix, keep their traceback.
    """
    try:
        return command() or 0
    except AlignError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 0
    except OSError as error:
        if debug or error.errno not in _NO_ROOM:
            raise
        sys.stderr.write(f"error: {error.filename or 'a file'}: {error.strerror}; free space or choose another place\n")
        return MachineError.exit_code


@contextmanager
def warn_instead(what: str) -> Iterator[None]:
    """Turn whatever is raised inside, Ctrl-C included, into a warning on stderr that begins with `what`."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError, ValueError):  # nobody may be reading any more
            sys.stderr.write(f"warning: {what}: {type(error).__name__}: {error}\n")


def _reader_is_gone() -> bool:
    """Return whether the reader of a pipe has gone (`| head`), and if so discard all further output."""
    gone = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


def _is_broken(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # a closed other end is reported without being asked for
    except (OSError, ValueError):  # no file at all: in a test, or closed
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
