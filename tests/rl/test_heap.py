"""Where glibc puts large blocks."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.rl.heap import own_pages

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc what it has done")


def has_own_pages(tensor):
    """Whether glibc says so: the second bit of the word before a block (malloc/malloc.c, IS_MMAPPED)."""
    return bool(ctypes.c_size_t.from_address(tensor.data_ptr() - 8).value & 2)


def test_a_large_tensor_has_pages_of_its_own_inside_and_lies_in_the_heap_outside():
    # In a process of its own: in one that has run for long, a hole in the heap may be just large enough.
    script = (
        "import sys; sys.path.insert(0, 'tests/rl')\n"
        "import torch\n"
        "from test_heap import has_own_pages, own_pages\n"
        "with own_pages():\n"
        "    large, small = torch.ones(2**20), torch.ones(2**10)\n"
        "print([has_own_pages(each) for each in (large, small, torch.ones(2**20))])\n"
    )

    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    assert (done.stdout.strip(), done.stderr) == ("[True, False, False]", "")


def test_what_is_usual_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), own_pages():
        _ = 1 / 0

    assert not has_own_pages(torch.ones(2**20))
