"""Nothing leaves the machine: a real run in a process whose sockets tell on it."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import socket, sys
asked = []
def tell(self, address, *rest):
    asked.append(address)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = tell
def look_up(host, *rest, **more):
    asked.append(host)
    raise OSError("no network here")
socket.getaddrinfo = look_up
from align import sft
code = sft.main(sft.STAGE, sys.argv[1:])
sys.exit(f"asked the network for {asked}" if asked else code)
"""


def test_a_run_with_default_settings_asks_the_network_for_nothing(tmp_path, tiny_base, demonstrations):
    free = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_", "CI"))}
    settings = [f"model={tiny_base}", f"data={demonstrations}", "name=quiet", "max_steps=2", "bf16=false"]

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--registry", str(tmp_path), *settings],
        capture_output=True, text=True, check=False, env=free,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "registered quiet@v1" in done.stdout
