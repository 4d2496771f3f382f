from __future__ import annotations

import subprocess
import sys

import pytest

from align.errors import guard

WRITES_ON = """
import sys
from align.errors import guard
sys.exit(guard(lambda: [print("x" * 999) for _ in range(9999)] and 0))
"""


def test_a_reader_that_goes_ends_a_command_without_a_word():
    asked = [sys.executable, "-c", WRITES_ON]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(300) == 0


def test_another_pipe_that_breaks_is_no_success():
    def breaks():
        raise BrokenPipeError("a worker has gone")

    with pytest.raises(BrokenPipeError):
        guard(breaks)
    sys.stderr.write("still open")
