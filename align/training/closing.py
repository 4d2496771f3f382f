"""What follows once a version is registered: whatever goes wrong there is told, and the run has ended well."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn whatever is raised inside, Ctrl-C included, into a warning on stderr that begins with `what`."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError, ValueError):  # nobody may be reading any more
            sys.stderr.write(f"warning: {what}: {type(error).__name__}: {error}\n")
