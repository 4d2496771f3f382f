"""Trackers hold what metrics.jsonl holds, of every stage, through their own offline modes and local files."""

from __future__ import annotations

import importlib.util
import json
import signal
import sqlite3
import zipfile
from pathlib import Path

import pytest
from aftermath import log_of, run_folder, versions
from test_ppo_ranks import ppo_course  # noqa: F401  a fixture

TOKEN = "hf" + "_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
Points = dict[str, list[tuple[int, float]]]


def wandb_files(folder: Path) -> bytes:
    found = sorted(folder.glob("runs/*/*/wandb/offline-run-*/*.wandb"))
    assert found
    return b"".join(path.read_bytes() for path in found)


def mlflow_points(folder: Path, run_id: str, monkeypatch) -> Points:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=f"file:{folder / 'mlruns'}")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert json.loads(client.get_run(run_id).data.params["stage"]) in ("sft", "ppo")
    keys = client.get_run(run_id).data.metrics
    return {key: [(each.step, each.value) for each in client.get_metric_history(run_id, key)] for key in keys}


def trackio_points(folder: Path) -> Points:
    (path,) = (folder / "trackio").glob("*.db")
    found: Points = {}
    for step, metrics in sqlite3.connect(path).execute("select step, metrics from metrics order by step"):
        for key, value in json.loads(metrics).items():
            found.setdefault(key, []).append((step, value))
    return found


def comet_points(root: Path) -> Points:
    (path,) = run_folder(root).glob("*.zip")
    found: Points = {}
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            metric = json.loads(line)["payload"].get("metric")
            if metric is not None:
                found.setdefault(metric["metricName"], []).append((metric["step"], metric["metricValue"]))
    return found


def environment_of(folder: Path) -> dict[str, str]:
    return {
        "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"file:{folder / 'mlruns'}", "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"), "COMET_START_ONLINE": "false", "COMET_API_KEY": "",
    }  # fmt: skip


def need(tracker: str) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed: pip install 'align[trackers]' ; comet_ml comes by itself")


TRACKERS = ("wandb", "mlflow", "trackio", "comet_ml")


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("course", ["sft"], indirect=True)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_tracker_holds_the_log_of_a_run(warm, course, ppo_course, tmp_path, monkeypatch, tracker, stage):  # noqa: F811
    need(tracker)
    root = tmp_path / "registry"
    chosen = ppo_course if stage == "ppo" else course
    more = {} if stage == "ppo" else {"trainer.hub_token": TOKEN}
    words = chosen.words(root, report_to=f"[{tracker}]", max_steps=2, **more)

    ended = warm.run(stage, words, environment=environment_of(tmp_path))

    assert ended.code == 0, ended.err
    assert "warning: report_to" not in ended.err
    lines = log_of(root)
    assert [line["step"] for line in lines] == [1, 2]
    key = "score_mean" if stage == "ppo" else "loss"
    expected = [(line["step"], pytest.approx(line[key])) for line in lines]
    if tracker == "wandb":
        held = wandb_files(root)
        assert all(json.dumps(line[key]).encode() in held for line in lines)
    else:
        run_id = json.loads((run_folder(root) / "trackers.json").read_text())[tracker]
        points = {
            "mlflow": lambda: mlflow_points(tmp_path, run_id, monkeypatch),
            "trackio": lambda: trackio_points(tmp_path),
            "comet_ml": lambda: comet_points(root),
        }[tracker]()
        assert points[key] == expected
        between = "." if tracker == "mlflow" else "/"
        assert points.keys() >= {name.replace("/", between) for name in lines[0] if name != "step"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["mlflow", "trackio", "wandb"])
@pytest.mark.parametrize("course", ["sft"], indirect=True)
def test_a_resumed_run_goes_on_in_the_same_place(warm, course, tmp_path, monkeypatch, tracker):
    need(tracker)
    root, environment = tmp_path / "registry", environment_of(tmp_path)
    words = course.words(root, report_to=f"[{tracker}]", max_steps=8)
    assert warm.run("sft", words, signal=signal.SIGKILL, at_step=6, environment=environment).code == -signal.SIGKILL
    called = json.loads((run_folder(root) / "trackers.json").read_text())

    ended = warm.run("sft", [*words, "--resume"], environment=environment)

    assert ended.code == 0, ended.err
    assert json.loads((run_folder(root) / "trackers.json").read_text()) == called
    if tracker != "wandb":
        found = (
            mlflow_points(tmp_path, called[tracker], monkeypatch) if tracker == "mlflow" else trackio_points(tmp_path)
        )
        assert {step for step, _ in found["loss"]} >= {5, 6, 7, 8}


@pytest.mark.slow
@pytest.mark.parametrize("course", ["sft"], indirect=True)
def test_a_tracker_that_does_not_open_ends_the_run_before_the_first_step(warm, course, tmp_path):
    need("mlflow")
    words = course.words(tmp_path / "registry", report_to="[mlflow]", max_steps=2)
    blocked = {"MLFLOW_TRACKING_URI": "nowhere://x"}

    ended = warm.run("sft", words, environment=environment_of(tmp_path) | blocked)

    assert ended.code == 6
    assert "error: report_to=mlflow: it does not open (" in ended.err
    assert "MLFLOW_TRACKING_URI says where" in ended.err
    assert versions(tmp_path / "registry") == []


def test_a_tracker_that_fails_while_training_is_told_and_left_out(tmp_path, capsys, monkeypatch):
    from align.training import trackers as tracking

    class Full:
        id = "x"

        def add(self, step, numbers):
            raise ConnectionError("the server is gone")

        def close(self, *, ended_well):
            raise AssertionError("it was left out")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda run, run_id: Full())
    trackers = tracking.Trackers(["wandb"], tmp_path)
    trackers.open(tracking.TrackedRun("run", tmp_path, {}))

    trackers.add(1, {"loss": 1.0})
    trackers.add(2, {"loss": 1.0})
    trackers.close(ended_well=True)

    told = capsys.readouterr().err
    assert told.count("warning: report_to=wandb: ConnectionError: the server is gone; it gets no more") == 1
