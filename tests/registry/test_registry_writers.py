"""Eight processes commit and move an alias at once; three of them are killed without warning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from align.registry import Registry, upkeep

WRITER = """
import sys
from align.registry import open_registry

root, who, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
registry = open_registry(root)
for number in range(count):
    with registry.stage("m") as staging:
        (staging.path / "adapter_config.json").write_text("{}")
        (staging.path / "adapter_model.safetensors").write_bytes(who.encode() * 50_000)
        checkpoint = staging.commit({"stage": "sft", "kind": "policy", "metrics": {"who": int(who)}})
    registry.set_alias("m", "newest", checkpoint.version)
    print(checkpoint.version, flush=True)
"""
WRITERS, KILLED, COMMITS = 5, 3, 6


def _start(registry: Registry, who: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(registry.root), str(who), str(count)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_concurrent_writers_of_which_some_are_killed_share_the_numbers(registry):
    victims = [_start(registry, 90 + who, 1_000_000) for who in range(KILLED)]
    for victim in victims:
        assert victim.stdout is not None
        victim.stdout.readline()
    writers = [_start(registry, who, COMMITS) for who in range(WRITERS)]
    lost = []
    for victim in victims:
        time.sleep(0.15)
        os.kill(victim.pid, signal.SIGKILL)
        lost += victim.communicate()[0].split()
    acknowledged = [writer.communicate(timeout=300)[0].split() for writer in writers]

    versions = registry.versions("m")
    numbers = [version.version for version in versions]
    by_writer = [[str(v.version) for v in versions if v.manifest["metrics"]["who"] == who] for who in range(WRITERS)]

    assert [writer.returncode for writer in writers] == [0] * WRITERS
    assert numbers == list(range(1, len(versions) + 1))
    assert acknowledged == by_writer
    assert {len(each) for each in by_writer} == {COMMITS}
    assert set(map(int, lost)) <= set(numbers)
    assert registry.verify() == []
    assert registry.aliases("m")["newest"] in numbers
    # A kill between the rename and what follows it may leave a folder in tmp/, or a version that can be written to.
    assert {finding.trouble for finding in upkeep.examine(registry)} <= {"abandoned", "writable"}
    upkeep.repair(registry, upkeep.examine(registry))
    assert upkeep.examine(registry) == []
