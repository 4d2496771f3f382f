"""Experiment trackers: the numbers of metrics.jsonl, sent to those that `report_to` names, in every stage.

A tracker opens just before the first step, so that one that cannot be reached ends the run before the work. One that
fails later is left out with a warning: metrics.jsonl is the log, and training goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import MachineError, warn_instead

_PROJECT = "align"
"""the project where the tracker's own environment variable names none"""
_IDS_FILE = "trackers.json"
"""the file of a run folder with the id of the run in each tracker"""
_REMEDIES = {
    "wandb": "wandb login, or WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI says where its server or database is",
    "trackio": "TRACKIO_DIR says where its files go",
    "comet_ml": "COMET_API_KEY, or COMET_START_ONLINE=false",
}
"""how each tracker is reached, or works offline"""


@dataclass(frozen=True)
class TrackedRun:
    """Name, folder and settings of a run, without access tokens."""

    name: str
    folder: Path
    settings: dict[str, Any]

    @property
    def title(self) -> str:
        """The run's name among others of its name."""
        return f"{self.name}-{self.folder.name}"


@dataclass(frozen=True)
class Tracker:
    """An open tracker."""

    id: str
    """finds it again when the run is resumed"""
    add: Callable[[int, dict[str, float]], Any]
    """sends the numbers of a step"""
    close: Callable[[bool], Any]
    """sends what is left and whether the run ended well"""


class Trackers:
    """The trackers of one run; one that fails while the run goes on gets no more numbers."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self._names, self._folder = names, folder
        self._tensorboard = _TensorBoard(folder) if "tensorboard" in names else None
        self._trackers: dict[str, Tracker] = {}

    def open(self, run: TrackedRun) -> None:
        """Open all but TensorBoard's file; raises MachineError for one that does not open."""
        path = self._folder / _IDS_FILE
        ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in self._names:
            if name in TRACKERS:
                try:
                    with redirect_stdout(sys.stderr):
                        self._trackers[name] = TRACKERS[name](run, ids.get(name))
                except Exception as error:  # whatever a tracker raises, the setting that asked for it is what helps
                    why = _first_line(error)
                    raise MachineError(
                        f"report_to={name}: it does not open ({why}); {_REMEDIES[name]}; or leave it out"
                    ) from error
        if self._trackers:
            ids = {name: tracker.id for name, tracker in self._trackers.items()}
            path.write_text(json.dumps(ids), encoding="utf-8")

    def forget_after(self, step: int) -> None:
        """Let TensorBoard drop what was logged after a step; the other trackers get the same numbers again."""
        if self._tensorboard is not None:
            self._tensorboard.forget_after(step)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step to each tracker."""
        if self._tensorboard is not None:
            self._tensorboard.add(step, numbers)
        for name, tracker in list(self._trackers.items()):
            try:
                with redirect_stdout(sys.stderr):
                    tracker.add(step, numbers)
            except Exception as error:  # whatever a tracker raises, it is not worth a run
                del self._trackers[name]
                why = _first_line(error)
                sys.stderr.write(f"warning: report_to={name}: {why}; it gets no more, metrics.jsonl does\n")

    def close(self, *, ended_well: bool) -> None:
        """Close all; a failure to do so is a warning and changes nothing about how the run ended."""
        if self._tensorboard is not None:
            with warn_instead("the log for TensorBoard could not be closed"):
                self._tensorboard.close()
        for name, tracker in self._trackers.items():
            with warn_instead(f"report_to={name} could not be closed"), redirect_stdout(sys.stderr):
                tracker.close(ended_well)
        self._trackers = {}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _find_project(variable: str) -> str:
    return os.environ.get(variable) or _PROJECT


class _TensorBoard:
    """Writes numbers as TensorBoard scalars into the folder `events`, which the first number makes."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / "events"
        self._purge_step: int | None = None
        self._writer: Any = None

    def forget_after(self, step: int) -> None:
        self._purge_step = step + 1 if self._folder.is_dir() else None

    def add(self, step: int, numbers: dict[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _open_wandb(run: TrackedRun, run_id: str | None) -> Tracker:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    run_id = run_id or uuid.uuid4().hex
    # Neither code nor the command line is sent: a part of it may be an access token.
    quiet = wandb.Settings(x_disable_meta=True, disable_code=True, disable_git=True, console="off", silent=True)
    opened = wandb.init(
        project=_find_project("WANDB_PROJECT"), name=run.title, id=run_id, resume="allow", dir=str(run.folder),
        config=run.settings, settings=quiet,
    )  # fmt: skip
    # A resumed run goes back, which wandb's own counter of steps does not.
    opened.define_metric("*", step_metric="step")
    return Tracker(
        run_id,
        add=lambda step, numbers: opened.log({**numbers, "step": step}),
        close=lambda ended_well: opened.finish(exit_code=0 if ended_well else 1),
    )


def _open_mlflow(run: TrackedRun, run_id: str | None) -> Tracker:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException:
            sys.stderr.write(f"report_to=mlflow: run {run_id} does not exist any more; a new one is made\n")
            run_id = None
    if run_id is None:
        name = _find_project("MLFLOW_EXPERIMENT_NAME")
        existing = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if existing is None else existing.experiment_id
        run_id = str(client.create_run(experiment, run_name=run.title).info.run_id)
        settings = [Param(key, json.dumps(value)[:500]) for key, value in run.settings.items()]
        client.log_batch(run_id, params=settings)

    def add(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        # Its file store makes a folder of the part before a slash, and a key may have the name of that folder.
        metrics = [Metric(key.replace("/", "."), value, now, step) for key, value in numbers.items()]
        client.log_batch(run_id, metrics=metrics)

    return Tracker(
        run_id, add, close=lambda ended_well: client.set_terminated(run_id, "FINISHED" if ended_well else "FAILED")
    )


def _open_trackio(run: TrackedRun, run_id: str | None) -> Tracker:
    import trackio

    run_id = run_id or run.title
    opened = trackio.init(
        project=_find_project("TRACKIO_PROJECT"), name=run_id, resume="allow", config=run.settings, embed=False,
        auto_log_cpu=False, auto_log_gpu=False,
    )  # fmt: skip
    return Tracker(run_id, lambda step, numbers: opened.log(numbers, step=step), lambda _: opened.finish())


def _open_comet(run: TrackedRun, run_id: str | None) -> Tracker:
    os.environ.setdefault("COMET_OFFLINE_DIRECTORY", str(run.folder))
    import comet_ml

    off = (
        "log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args",
        "auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_histogram_weight_logging",
    )  # fmt: skip
    config = comet_ml.ExperimentConfig(name=run.title, **dict.fromkeys(off, False))
    run_id = run_id or uuid.uuid4().hex
    project = _find_project("COMET_PROJECT_NAME")
    opened = comet_ml.start(project_name=project, experiment_key=run_id, experiment_config=config)
    opened.log_parameters(run.settings)
    return Tracker(run_id, lambda step, numbers: opened.log_metrics(numbers, step=step), lambda _: opened.end())


TRACKERS: dict[str, Callable[[TrackedRun, str | None], Tracker]] = {
    "wandb": _open_wandb, "mlflow": _open_mlflow, "trackio": _open_trackio, "comet_ml": _open_comet,
}  # fmt: skip
