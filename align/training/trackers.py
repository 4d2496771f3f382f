"""The log of a run for experiment trackers: what metrics.jsonl holds, sent wherever `report_to` says, in every stage.

A tracker opens just before the first step, so that one that cannot be reached ends the run before the work. One that
fails later is told and left out: metrics.jsonl is the log, and training goes on.
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
from typing import Any, Protocol

from align.errors import MachineError
from align.training.closing import harmless
from align.training.events import Events

PROJECT = "align"
"""the project where the tracker's own environment variable names none"""
IDS = "trackers.json"
"""the file of a run folder that says what a resumed run is called elsewhere"""
_OFFLINE = {
    "wandb": "wandb login, or WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI says where its server or database is",
    "trackio": "TRACKIO_DIR says where its files go",
    "comet_ml": "COMET_API_KEY, or COMET_START_ONLINE=false",
}
"""how each is reached, or does without being reached"""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run; `settings` hold no access token."""

    name: str
    folder: Path
    settings: dict[str, Any]

    @property
    def title(self) -> str:
        """The run's name among others of its name."""
        return f"{self.name}-{self.folder.name}"


class Tracker(Protocol):
    """Takes the numbers of a run; `id` finds it again when the run is resumed."""

    id: str

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step."""

    def close(self, *, ended_well: bool) -> None:
        """Send what is left and say how the run ended."""


class Trackers:
    """The trackers of one run, opened by `start`; TensorBoard's files are written by `Events`."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self._names, self._folder = names, folder
        self._events = Events(folder) if "tensorboard" in names else None
        self._open: dict[str, Tracker] = {}

    def start(self, about: About) -> None:
        """Open those that are not files of ours; raises MachineError for one that does not open."""
        path = self._folder / IDS
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in self._names:
            if name in _OPEN:
                self._open[name] = _opened(name, about, known.get(name))
        if self._open:
            path.write_text(json.dumps({name: each.id for name, each in self._open.items()}), encoding="utf-8")

    def forget_after(self, step: int) -> None:
        """Let TensorBoard drop what was logged after a step; with the others the repeated steps say the same."""
        if self._events is not None:
            self._events.forget_after(step)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step to each; one that fails is told of and gets no more."""
        if self._events is not None:
            self._events.add(step, numbers)
        for name, tracker in list(self._open.items()):
            try:
                with redirect_stdout(sys.stderr):
                    tracker.add(step, numbers)
            except Exception as error:  # whatever a tracker raises, it is not worth a run
                del self._open[name]
                sys.stderr.write(f"warning: report_to={name}: {_said(error)}; it gets no more, metrics.jsonl does\n")

    def close(self, *, ended_well: bool) -> None:
        """Close all; what goes wrong is told and changes nothing about how the run ended."""
        if self._events is not None:
            with harmless("the log for TensorBoard could not be closed"):
                self._events.close()
        for name, tracker in self._open.items():
            with harmless(f"report_to={name} could not be closed"), redirect_stdout(sys.stderr):
                tracker.close(ended_well=ended_well)
        self._open = {}


def _opened(name: str, about: About, known: str | None) -> Tracker:
    try:
        with redirect_stdout(sys.stderr):
            return _OPEN[name](about, known)
    except Exception as error:  # whatever a tracker raises, the setting that asked for it is what helps
        raise MachineError(
            f"report_to={name}: it does not open ({_said(error)}); {_OFFLINE[name]}; or leave it out"
        ) from error


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _project(variable: str) -> str:
    return os.environ.get(variable) or PROJECT


class _Wandb:
    def __init__(self, about: About, known: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.id = known or uuid.uuid4().hex
        # Neither code nor the command line is sent: a word of it may be an access token.
        quiet = wandb.Settings(x_disable_meta=True, disable_code=True, disable_git=True, console="off", silent=True)
        self._run = wandb.init(
            project=_project("WANDB_PROJECT"), name=about.title, id=self.id, resume="allow", dir=str(about.folder),
            config=about.settings, settings=quiet,
        )  # fmt: skip
        # A resumed run goes back, which wandb's own counter of steps does not.
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self, *, ended_well: bool) -> None:
        self._run.finish(exit_code=0 if ended_well else 1)


class _Mlflow:
    def __init__(self, about: About, known: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient()
        if known is not None:
            try:
                self._client.update_run(known, status="RUNNING")
                self.id = known
                return
            except MlflowException:
                sys.stderr.write(f"report_to=mlflow: run {known} is not there any more; a new one is made\n")
        name = _project("MLFLOW_EXPERIMENT_NAME")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self.id = str(self._client.create_run(experiment, run_name=about.title).info.run_id)
        settings = [Param(key, json.dumps(value)[:500]) for key, value in about.settings.items()]
        self._client.log_batch(self.id, params=settings)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # Its file store makes a folder of what stands before a slash, and a key may be called as that folder.
        named = {key.replace("/", "."): value for key, value in numbers.items()}
        self._client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in named.items()])

    def close(self, *, ended_well: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if ended_well else "FAILED")


class _Trackio:
    def __init__(self, about: About, known: str | None) -> None:
        import trackio

        self.id = known or about.title
        self._run = trackio.init(
            project=_project("TRACKIO_PROJECT"), name=self.id, resume="allow", config=about.settings, embed=False,
            auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip

    def add(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self, *, ended_well: bool) -> None:
        self._run.finish()


class _Comet:
    def __init__(self, about: About, known: str | None) -> None:
        os.environ.setdefault("COMET_OFFLINE_DIRECTORY", str(about.folder))
        import comet_ml

        off = (
            "log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args",
            "auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_histogram_weight_logging",
        )  # fmt: skip
        config = comet_ml.ExperimentConfig(name=about.title, **dict.fromkeys(off, False))
        self.id = known or uuid.uuid4().hex
        self._run = comet_ml.start(
            project_name=_project("COMET_PROJECT_NAME"), experiment_key=self.id, experiment_config=config
        )
        self._run.log_parameters(about.settings)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log_metrics(numbers, step=step)

    def close(self, *, ended_well: bool) -> None:
        self._run.end()


_OPEN: dict[str, Callable[[About, str | None], Tracker]] = {
    "wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio, "comet_ml": _Comet,
}  # fmt: skip
