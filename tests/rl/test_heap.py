"""Where glibc puts large blocks."""

import ctypes
import platform

import pytest
import torch

from align.rl.heap import own_pages

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc what it has done")


class Usage(ctypes.Structure):
    """What mallinfo2(3) fills in; `hblkhd` is bytes in pages of their own."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]


def bytes_in_pages_of_their_own():
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Usage
    return library.mallinfo2().hblkhd


def test_a_large_tensor_has_pages_of_its_own_inside_and_lies_in_the_heap_outside():
    before = bytes_in_pages_of_their_own()
    with own_pages():
        inside = torch.ones(2**20)
        during = bytes_in_pages_of_their_own()
    outside = torch.ones(2**20)
    after = bytes_in_pages_of_their_own()
    del inside

    assert during - before >= 4 * 2**20
    assert after == during
    assert bytes_in_pages_of_their_own() <= after - 4 * 2**20
    assert outside.sum() == 2**20
