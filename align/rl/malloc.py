"""glibc's mmap threshold: large allocations that go back to the system as soon as they are freed."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)"""
_LARGE_BYTES = 1 << 20
_DEFAULT_BYTES = 32 << 20
"""the mmap threshold that glibc reaches by itself once large blocks have come and gone"""


@contextmanager
def mmap_large_allocations() -> Iterator[None]:
    """Let glibc allocate blocks of a MiB or more with mmap; with another C library nothing changes.

    On the heap the tensors that an autograd graph keeps would lie between freed ones, and that memory would not go
    back: with 100M parameters as much again as the graph. Sampling, whose keys and values grow with each token, is
    faster on the heap.
    """
    if _GLIBC is None:
        yield
        return
    _GLIBC.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        _GLIBC.mallopt(_MMAP_THRESHOLD, _DEFAULT_BYTES)
        # Once either is set, glibc no longer adapts the other.
        _GLIBC.mallopt(_TRIM_THRESHOLD, 2 * _DEFAULT_BYTES)
