"""Files that would fill the memory, block for ever, or are not what they say."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path


def hostile(folder: Path) -> dict[str, Path]:
    """Files and folders that would fill the memory, block for ever, or are not what they say."""
    import pyarrow.parquet

    folder.mkdir()
    pipe = folder / "pipe.jsonl"
    os.mkfifo(pipe)
    mixed = folder / "mixed"
    mixed.mkdir()
    os.mkfifo(mixed / "README.md")
    os.mkfifo(mixed / "a.jsonl")
    (mixed / "zero.jsonl").symlink_to("/dev/zero")
    zeros = gzip.compress(bytes(300 << 20), 1)
    bomb = folder / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b"\n" * (300 << 20), 1))
    line = folder / "line.jsonl.gz"
    line.write_bytes(zeros)
    lies = folder / "lies.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": list(map(str, range(2000)))}), lies)
    content = bytearray(lies.read_bytes())
    content[-8:-4] = (2**31 - 1).to_bytes(4, "little")
    lies.write_bytes(content)
    arrow = folder / "lies.arrow"
    arrow.write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(64))
    nested = folder / "nested.yaml"
    nested.write_text("a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(30)))
    return {path.name: path for path in (pipe, mixed, bomb, line, lies, arrow, nested)}


GUARDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from align.data.__main__ import main
sys.exit(main(["check", sys.argv[1]]))
"""


def test_hostile_files_end_in_one_line_within_seconds_and_bounded_memory(tmp_path):
    for name, path in hostile(tmp_path / "hostile").items():
        run = subprocess.run([sys.executable, "-c", GUARDED, path], capture_output=True, text=True, timeout=60)

        assert run.returncode == 3, (name, run.stdout, run.stderr)
        assert run.stderr.startswith("error: "), (name, run.stderr)
        assert "Traceback" not in run.stderr
