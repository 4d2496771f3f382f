"""A run of a stage: what a stage function gets besides its settings."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, dump_yaml
from align.registry.durable import write_durably
from align.registry.redaction import redact_lines
from align.training.checkpoints import Checkpoints, Continuation
from align.training.identity import check_allowed, describe_run, refuse_changes
from align.training.progress import print_line
from align.training.ranks import Ranks
from align.training.run_log import RunLog
from align.training.training_data import TrainingData

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage

STARTED, FINISHED = "run.json", "finished.json"


class Run:
    """A run with its folder, data, log and checkpoints; made by `open_run`."""

    def __init__(
        self,
        stage: Stage,
        config: StageConfig,
        registry: Registry,
        folder: Path,
        ranks: Ranks,
        continuation: Continuation,
    ) -> None:
        self.stage, self.config, self.registry, self.folder, self.ranks = stage, config, registry, folder, ranks
        self.data = TrainingData(stage, config, registry, ranks, self.print_line)
        self.checkpoints = Checkpoints(folder, self.fingerprint, ranks, continuation)
        self.log = RunLog(stage.name, config, folder, self.checkpoints)
        self.stopped_by: int | None = None
        """the signal that asked the run to stop"""
        self.registered: str | None = None
        """the reference of the version, from the moment it is in the registry"""

    @property
    def stopping(self) -> bool:
        """True when the run was asked to stop."""
        return self.stopped_by is not None

    def stop(self, signal_number: int) -> None:
        """Ask the run to stop at its next safe point."""
        self.stopped_by = signal_number

    @cached_property
    def parent(self) -> Checkpoint:
        """The checkpoint `model` refers to."""
        return self.registry.resolve(self.config.model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Stage, settings, versions and resolved references: what identifies the run before it has read its data."""
        identity = describe_run(self.stage, self.config, self.registry, self.ranks.world_size)
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def fingerprint(self) -> dict[str, Any]:
        """Return what a run and its continuation must share: its identity and the data it has read."""
        return self.identity | self.data.fingerprint()

    def print_line(self, text: str) -> None:
        """Print a line for the user on rank 0."""
        if self.ranks.is_rank_zero:
            print_line(text)

    def start(self) -> str | None:
        """Write identity and settings into the folder, or return the reference that the finished run has registered.

        Raises IntegrityError, before anything is written, when the run was started with other settings.
        """
        return self.ranks.from_rank_zero(self._start)

    def _start(self) -> str | None:
        allowed = self.checkpoints.continuation.allow_change
        check_allowed(allowed, self.identity)
        path = self.folder / STARTED
        if path.is_file():
            what = f"--resume {self.folder}: this is not the run that was started"
            refuse_changes(what, json.loads(path.read_text(encoding="utf-8")), self.identity, allowed)
            if (registered := self._find_registered()) is not None:
                return registered
        write_durably(path, json.dumps(self.identity).encode())
        write_durably(self.folder / "config.yaml", redact_lines(dump_yaml(self.config)).encode())
        return None

    def _find_registered(self) -> str | None:
        """Return the reference that the run has registered, also when it was killed before it could write so."""
        path = self.folder / FINISHED
        if path.is_file():
            reference: str = json.loads(path.read_text(encoding="utf-8"))["reference"]
            return reference
        for version in reversed(self.registry.versions(self.config.name)):
            if (version.manifest or {}).get("run") == self.folder.name:
                self.finish(version.reference)
                return version.reference
        return None

    def resume_point(self) -> tuple[int, Path] | None:
        """Return the step and checkpoint to resume from, or None; what was logged after that step is dropped."""
        checkpoints = self.checkpoints
        point = self.ranks.from_rank_zero(checkpoints.newest)
        self.log.forget_after(point[0] if point is not None else 0)
        for torn in checkpoints.torn:
            self.print_line(f"checkpoint set aside as {torn}: it is incomplete or damaged")
        for change in checkpoints.changes:
            self.print_line(f"allowed to differ: {change}")
        if point is not None:
            self.print_line(f"{'going back to and ' if checkpoints.torn else ''}resuming from step {point[0]}")
        elif checkpoints.continuation.resume:
            self.print_line("no checkpoint yet; starting at step 0")
        return point

    def mark_registered(self, reference: str) -> None:
        """Note that the version is in the registry: the run has ended well, whatever follows."""
        self.registered = reference

    def finish(self, reference: str) -> None:
        """Write into the folder that the run is complete."""
        write_durably(self.folder / FINISHED, json.dumps({"reference": reference}).encode())
