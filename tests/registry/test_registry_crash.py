"""Power cuts at every durable operation, on a disk that loses whatever was not synced, with negative controls."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lossy_disk import OUTCOMES, FastDisk, LossyDisk, PowerCut

from align.registry import open_registry


def cut_power_everywhere(root: Path, commit, forgets=lambda what, path: False) -> Iterator[tuple[int, list[str]]]:
    """Commit m@v1, then cut the power at each step of committing m@v2 and moving an alias to it.

    Yields the step and what was found broken afterwards; the last step is right after everything succeeded.
    """
    for cut_at in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        disk = LossyDisk(root, forgets)
        registry = open_registry(root, disk)
        commit(registry, "m")
        registry.set_alias("m", "best", 1)
        acknowledged = ["m@v1"]
        disk.cut_at = disk.steps + cut_at
        try:
            acknowledged.append(commit(registry, "m").reference)
            registry.set_alias("m", "best", 2)
            finished = True
            disk.cut_power()
        except PowerCut:
            finished = disk.steps < disk.cut_at
        damage = (_damage(disk.image(outcome), acknowledged, finished, commit) for outcome in OUTCOMES)
        yield cut_at, [f"{outcome}: {what}" for outcome, found in zip(OUTCOMES, damage, strict=True) for what in found]
        if finished:
            return


def _damage(image: Path, acknowledged: list[str], finished: bool, commit) -> list[str]:
    registry = open_registry(image, FastDisk())
    found = registry.verify()
    versions = [version.reference for version in registry.versions("m")]
    found += [f"{reference} was acknowledged and is lost" for reference in acknowledged if reference not in versions]
    alias = registry.aliases("m").get("best")
    if alias not in ((2,) if finished else (1, 2)):
        found.append(f"the alias is {alias}")
    if commit(registry, "m").reference in versions:
        found.append("a retry did not get a version of its own")
    return found


def test_a_power_cut_at_any_step_loses_nothing_acknowledged_and_tears_nothing(tmp_path, commit):
    found = list(cut_power_everywhere(tmp_path / "work" / "registry", commit))

    assert [(step, broken) for step, broken in found if broken] == []
    assert len(found) > 15


CONTROLS = {
    "staged files are not synced": lambda what, path: what == "file" and path.suffix == ".safetensors",
    "the manifest is not synced": lambda what, path: what == "file" and "manifest.json" in path.name,
    "the staged folder is not synced": lambda what, path: what == "folder" and path.parent.name == "tmp",
    "the parent of the version is not synced": lambda what, path: what == "folder" and path.name == "m",
    "the alias is not synced": lambda what, path: what == "file" and "best" in path.name,
}


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_control_a_missing_sync_is_seen(tmp_path, commit, control):
    found = cut_power_everywhere(tmp_path / "work" / "registry", commit, CONTROLS[control])

    assert any(broken for _, broken in found)
