"""The log of a run for TensorBoard, in the folder `events` beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "events"


class Events:
    """Writes numbers as TensorBoard scalars; a writer that is never used creates nothing."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / FOLDER
        self._purge: int | None = None
        self._writer: Any = None

    def forget_after(self, step: int) -> None:
        """Let readers drop what an earlier process wrote after this step."""
        self._purge = step + 1 if self._folder.is_dir() else None

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of a step; they are on disk when this returns."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._writer is not None:
            self._writer.close()
