"""A disk that can show what is left of it after a power cut at any of its operations."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from align.registry.durable import Disk

OUTCOMES = ("kept", "data lost", "all lost")
Forgets = Callable[[str, Path], bool]


class PowerCut(BaseException):
    """The machine is off: nothing after this runs."""


class LossyDisk(Disk):
    """Knows what each sync has made durable, and can show what a disk would hold after a power cut now.

    Three outcomes are possible and all are checked: `kept` (only the process died), `data lost` (names are there, the
    content of files that were not synced is cut in half), and `all lost` (names that were not synced are gone as well).
    """

    def __init__(self, root: Path, forgets: Forgets = lambda what, path: False) -> None:
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
