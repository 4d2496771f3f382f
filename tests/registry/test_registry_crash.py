"""Power cuts at every durable operation, on a disk that loses whatever was not synced, with negative controls."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.registry import open_registry
from align.registry.durable import Disk


class PowerCut(BaseException):
    """The machine is off: nothing after this runs."""


class LossyDisk(Disk):
    """Knows what each sync has made durable, and can show what a disk would hold after a power cut now.

    Three outcomes are possible and all are checked: `kept` (only the process died), `data lost` (names are there, the
    content of files that were not synced is cut in half), and `all lost` (names that were not synced are gone as well).
    """

    def __init__(self, root: Path, forgets: Callable[[str, Path], bool] = lambda what, path: False) -> None:
        self.root = root
        self.forgets = forgets
        self.cut_at: int | None = None
        self.steps = 0
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, tuple[int, bool]]] = {}

    def write(self, path, data):
        self._step()
        super().write(path, data)

    def sync_file(self, path):
        self._step()
        if not self.forgets("file", path):
            self.files[path.stat().st_ino] = path.read_bytes()

    def sync_folder(self, path):
        self._step()
        if not self.forgets("folder", path):
            entries = os.scandir(path)
            self.folders[path.stat().st_ino] = {entry.name: (entry.inode(), entry.is_dir()) for entry in entries}

    def rename(self, source, target):
        self._step()
        super().rename(source, target)

    def _step(self) -> None:
        self.steps += 1
        if self.steps == self.cut_at:
            self.cut_power()

    def cut_power(self) -> None:
        shutil.rmtree(self.image("all lost").parent, ignore_errors=True)
        shutil.copytree(self.root, self.image("kept"))
        self._keep_names(self.root, self.image("data lost"))
        self._lose_names(self.root.stat().st_ino, self.image("all lost"))
        raise PowerCut

    def image(self, outcome: str) -> Path:
        return self.root.parent / "images" / outcome

    def _keep_names(self, folder: Path, target: Path) -> None:
        target.mkdir(parents=True)
        for path in folder.iterdir():
            if path.is_dir():
                self._keep_names(path, target / path.name)
            else:
                content = path.read_bytes()
                (target / path.name).write_bytes(self.files.get(path.stat().st_ino, content[: len(content) // 2]))

    def _lose_names(self, folder: int, target: Path) -> None:
        target.mkdir(parents=True)
        for name, (inode, is_folder) in self.folders.get(folder, {}).items():
            if is_folder:
                self._lose_names(inode, target / name)
            else:
                (target / name).write_bytes(self.files.get(inode, b""))


class FastDisk(Disk):
    """Syncs nothing: for looking at an image, where no power is cut any more."""

    def sync_file(self, path):
        pass

    def sync_folder(self, path):
        pass


OUTCOMES = ("kept", "data lost", "all lost")


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
