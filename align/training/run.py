"""One run of a stage: its folder, its log, its data, and being stopped without losing work."""

from __future__ import annotations

import fcntl
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, dump_yaml, write
from align.errors import DataError, DivergedError, IntegrityError, MachineError
from align.schema import View
from align.training.checkpoints import Checkpoints
from align.training.progress import Progress

if TYPE_CHECKING:
    from align.data import RecordSet
    from align.data.render import Rendered
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
_MUST_BE_FINITE = ("loss", "grad_norm", "policy_loss", "value_loss")
# Settings that may differ between a run and its continuation: they change what is reported, not what is trained.
_FREE = {"logging_steps", "save_steps", "eval_steps", "report_to"}


class Run:
    """What a stage function is given besides its settings."""

    def __init__(self, stage: Stage, config: StageConfig, registry: Registry, folder: Path, *, resume: bool) -> None:
        self.stage, self.config, self.registry, self.folder = stage, config, registry, folder
        self.checkpoints = Checkpoints(folder, self.fingerprint, resume=resume)
        self.data: list[dict[str, Any]] = []
        self.stopping = False
        self._progress: Progress | None = None

    @cached_property
    def parent(self) -> Checkpoint:
        """The checkpoint `model` refers to."""
        return self.registry.resolve(self.config.model)

    def records(self, spec: str | list[str] | None = None, view: View | None = None) -> RecordSet:
        """Load `data` (or `spec`) in the stage's view; what was read is kept for the manifest.

        Raises DataError when no row is left.
        """
        from align.data import load_records

        found = load_records(
            spec if spec is not None else self.config.data,
            view=view or self.stage.view,
            on_bad_row=self.config.on_bad_row,
            roots={"registry": self.registry.root},
        )
        for note in found.notes:
            self.say(note)
        if not found.records:
            raise DataError(f"{found.name}: 0 rows left to train on, dropped {found.dropped}; check the file")
        self.data.append(found.describe())
        return found

    def count_dropped(self, rendered: Rendered) -> Rendered:
        """Tell how many tokens are trained and which rows were dropped in rendering; keep it for the manifest."""
        if self.data:
            self.data[-1]["dropped"] = self.data[-1]["dropped"] | rendered.dropped
        share = rendered.trained_tokens / max(rendered.tokens, 1)
        trained = f", {share:.0%} of them trained" if share else ""
        self.say(f"{len(rendered.rows)} rows, {rendered.tokens} tokens{trained}")
        for reason, count in rendered.dropped.items():
            self.say(f"  dropped {count}: {reason}")
        return rendered

    def say(self, text: str) -> None:
        """One line for the user."""
        write(text)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and show it.

        Raises DivergedError when a loss or a gradient norm is not finite.
        """
        for key in _MUST_BE_FINITE:
            if key in numbers and not math.isfinite(numbers[key]):
                raise DivergedError(
                    f"step {step}: {key} is {numbers[key]}; training left the finite numbers and nothing was "
                    f"registered; lower learning_rate (now {self.config.learning_rate:g}) or check the data"
                )
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        if self._progress is not None:
            self._progress.note(step, numbers)

    def resume_point(self) -> tuple[int, Path] | None:
        """The step and folder to go on from, or None for a start; what was logged after that step is forgotten."""
        found = self.checkpoints.newest()
        if found is not None:
            self._forget_after(found[0])
            self.say(f"resuming from step {found[0]}")
        return found

    def _forget_after(self, step: int) -> None:
        log = self.folder / "metrics.jsonl"
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(line for line in lines if _logged_by(line, step)), encoding="utf-8")

    @contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        """Show progress over `total` steps; `advance` it once a step."""
        with Progress(self.config.name, total) as self._progress:
            yield self._progress
        self._progress = None

    def train(self, trainer: Any) -> dict[str, float]:
        """Run a transformers or TRL trainer to its end under this run's log, checkpoints and stops."""
        from align.training.loop import train

        return train(self, trainer)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        settings = {key: value for key, value in self.config.model_dump(mode="json").items() if key not in _FREE}
        data = {f"data[{index}]": entry["digest"] for index, entry in enumerate(self.data)}
        return settings | data | {"versions": package_versions()}

    @property
    def finished(self) -> str | None:
        """The reference this run registered, when it already ended well."""
        path = self.folder / "finished.json"
        return json.loads(path.read_text(encoding="utf-8"))["reference"] if path.is_file() else None

    def finish(self, reference: str) -> None:
        """Mark the run as complete."""
        (self.folder / "finished.json").write_text(json.dumps({"reference": reference}), encoding="utf-8")


def _logged_by(line: str, step: int) -> bool:
    """Whether a log line is whole and of this step or an earlier one; a power cut leaves the last line torn."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False


def package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on."""
    return {package: version(package) for package in PACKAGES}


@contextmanager
def open_run(stage: Stage, config: StageConfig, registry: Registry, *, resume: bool) -> Iterator[Run]:
    """Open a new run folder, or with `resume` the newest one of this name, and hold it against other processes.

    SIGTERM sets `run.stopping`; a stage then saves a checkpoint and raises PreemptedError.
    """
    from align.models.hub import no_telemetry

    no_telemetry()
    runs = registry.runs_dir(config.name)
    folder = _newest_folder(runs) if resume else _new_folder(runs)
    run = Run(stage, config, registry, folder, resume=resume)
    with _locked(folder), _on_sigterm(run):
        if run.finished is None:
            (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
            _seed(config.seed)
        yield run


def _new_folder(runs: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = runs / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise MachineError(f"{folder}: cannot be made ({error.strerror}); choose another --registry") from None
        return folder
    raise MachineError(f"{runs}: a thousand runs started this second; wait a second")


def _newest_folder(runs: Path) -> Path:
    """The run to go on with; a run that never started is begun, so that `--resume` is safe in a requeued job."""
    found = sorted(path for path in runs.glob("*") if (path / "config.yaml").is_file())
    return found[-1] if found else _new_folder(runs)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise IntegrityError(
                f"{folder}: another process is running in it; wait for it to end, or start a new run without --resume"
            ) from None
        yield


@contextmanager
def _on_sigterm(run: Run) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        run.stopping = True

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)
