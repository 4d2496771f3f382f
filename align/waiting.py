"""The first line of a command, written at once, and a spinner while libraries are imported and models loaded.

Both go to standard error: standard output is for results. A file or pipe gets plain lines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def announce(what: str) -> None:
    """Write the first line of a command to standard error."""
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for: a spinner on a terminal, gone without a trace when the wait ends, else one plain line.

    What is printed meanwhile stands above the spinner.
    """
    if not sys.stderr.isatty():
        announce(what)
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    # Lines on standard output stand above the spinner where both are one terminal; in a file they stay.
    console = Console(stderr=True, highlight=False)
    shared = sys.stdout.isatty()
    spinner = Spinner("dots", what)
    with Live(spinner, console=console, transient=True, refresh_per_second=10, redirect_stdout=shared):
        yield
