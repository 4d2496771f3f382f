"""What large tensors leave behind in this process's memory once they are freed."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").is_file(), reason="needs glibc and /proc"
)

# In a process of its own: in one that has run for long, holes in the heap may take the blocks.
SCRIPT = """
import contextlib, mmap
import torch
from align.rl.malloc import mmap_large_allocations

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE / 2**20

def left_after_freeing():
    before = resident()
    large, small = zip(*[(torch.ones(2**19), torch.ones(2**10)) for _ in range(64)])  # 128 MiB between small ones
    del large
    return resident() - before, small

torch.ones(30 * 2**18)  # Freeing 30 MiB raises glibc's mmap threshold above 2 MiB.
with mmap_large_allocations():
    inside, _kept = left_after_freeing()
with contextlib.suppress(ZeroDivisionError), mmap_large_allocations():
    1 / 0
after, _kept_too = left_after_freeing()
print(inside, after)
"""


def test_large_tensors_go_back_to_the_system_inside_and_stay_in_the_heap_after_it():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, timeout=300)

    assert done.returncode == 0, done.stderr
    inside, after = map(float, done.stdout.split())
    assert inside < 16
    assert after > 100
