"""A disk that is really full: a small file system of its own, where the machine lets a test mount one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path):
    target = tmp_path / "disk"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", target], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let the test mount a file system")
    yield target
    subprocess.run(["umount", "-l", target], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_ends_with_code_6_and_names_what_is_whole(small_disk, tiny_base, demonstrations):
    settings = [
        f"model={tiny_base}", f"data={demonstrations}", "name=full", "max_steps=12", "save_steps=2", "lora.r=4",
        "bf16=false", "per_device_train_batch_size=2",
    ]  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-m", "align.sft", "--registry", str(small_disk), *settings],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 6, done.stderr
    assert "the disk is full" in done.stderr
    assert "bytes are free" in done.stderr
    assert re.search(r"whole checkpoints in \S+/runs/full/\S+: checkpoint-2", done.stderr)
    assert "Traceback" not in done.stderr
    assert list((small_disk / "models").glob("*/v*")) == []
