"""The C library's heap: large blocks in pages of their own, which go back to the system as soon as they are freed."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""how mallopt(3) knows M_TRIM_THRESHOLD and M_MMAP_THRESHOLD"""
_LARGE = 1 << 20
_USUAL = 32 << 20
"""bytes from which glibc gives a block its own pages, once it has seen large ones come and go"""


@contextmanager
def mmap_large_allocations() -> Iterator[None]:
    """Inside, glibc gives a block of a MiB or more, unless a hole in its heap takes it, pages of its own.

    Where the C library is another one, nothing changes. In glibc's heap the tensors that a graph keeps lie between
    holes left by those it does not, and the holes stay: with 100M parameters as much again as the graph. Sampling,
    whose keys and values grow with each token, is quicker there.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL)
        # Once asked for either, glibc no longer moves the two together.
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)


@cache
def _glibc() -> Any:
    """The C library of this process where it is glibc, else None."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
