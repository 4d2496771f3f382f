"""Real processes, really stopped, then resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import sft
from align.registry import open_registry
from align.training.stage import main

STEPS = 120


def words(base: Path, data: Path, name: str, root: Path) -> list[str]:
    settings = {
        "model": base, "data": data, "name": name, "max_steps": STEPS, "save_steps": 5, "logging_steps": 1,
        "per_device_train_batch_size": 2, "bf16": "false", "lora.r": 2, "learning_rate": 1e-3, "lora.dropout": 0.1,
    }  # fmt: skip
    return ["--registry", str(root), *(f"{key}={value}" for key, value in settings.items())]


def stopped_run(line: list[str], root: Path, name: str, number: signal.Signals) -> subprocess.CompletedProcess:
    """Start a real run, stop it by a signal once it has logged ten steps, and wait for its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "align.sft", *line], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        logs = list((root / "runs" / name).glob("*/metrics.jsonl"))
        if logs and logs[0].read_text().count("\n") >= 10:
            process.send_signal(number)
            break
        time.sleep(0.05)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_base, demonstrations) -> Path:
    root = tmp_path_factory.mktemp("straight")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(sft.STAGE, words(tiny_base, demonstrations, "straight", root)) == 0
    torch.set_num_threads(threads)
    return Path(open_registry(root).resolve("straight").location)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_stopped_run_registers_nothing_and_resumes_to_the_same_bits(
    tmp_path, tiny_base, demonstrations, straight, number, code
):
    line = words(tiny_base, demonstrations, "stopped", tmp_path)

    stopped = stopped_run(line, tmp_path, "stopped", number)

    assert stopped.returncode == code, stopped.stderr
    assert open_registry(tmp_path).names() == []
    if number == signal.SIGTERM:
        assert "go on with the same command and --resume" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    resumed = subprocess.run(
        [sys.executable, "-m", "align.sft", *line, "--resume"], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step" in resumed.stdout
    ours = load_file(Path(open_registry(tmp_path).resolve("stopped").location) / "adapter_model.safetensors")
    theirs = load_file(straight / "adapter_model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_second_process_in_one_run_folder_is_refused(tmp_path, tiny_base, demonstrations, capsys):
    import fcntl

    line = words(tiny_base, demonstrations, "busy", tmp_path)
    folder = open_registry(tmp_path).runs_dir("busy") / "20260101-000000"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        assert main(sft.STAGE, [*line, "--resume"]) == 4

    assert "another process is running in it" in capsys.readouterr().err
