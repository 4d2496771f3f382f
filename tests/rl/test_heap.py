"""Where glibc puts large blocks."""

import ctypes
import platform

import pytest
import torch

from align.rl.heap import own_pages

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc what it has done")


def has_own_pages(tensor):
    """Whether glibc says so: the second bit of the word before a block (malloc/malloc.c, IS_MMAPPED)."""
    return bool(ctypes.c_size_t.from_address(tensor.data_ptr() - 8).value & 2)


def test_a_large_tensor_has_pages_of_its_own_inside_and_lies_in_the_heap_outside():
    with own_pages():
        large, small = torch.ones(2**20), torch.ones(2**10)
    outside = torch.ones(2**20)

    assert has_own_pages(large)
    assert not has_own_pages(small)
    assert not has_own_pages(outside)


def test_what_is_usual_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), own_pages():
        _ = 1 / 0

    assert not has_own_pages(torch.ones(2**20))
