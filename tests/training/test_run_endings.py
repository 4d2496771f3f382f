"""How a run ends when it cannot or must not go on: the code, the one line it says, and what is left."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aftermath import checkpoints, log_of, run_folder, versions, weights_of

from align.config import build
from align.errors import DivergedError
from align.registry.durable import write_durably
from align.sft import STAGE, SftConfig
from align.training.command import main
from align.training.endings import out_of_memory
from align.training.run import open_run

one_stage = pytest.mark.parametrize("course", ["sft"], indirect=True)


def one_line(ended) -> str:
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("error: ")
    return ended.err


@one_stage
def test_numbers_that_are_not_finite_end_with_code_5_and_name_the_last_good_checkpoint(warm, course, tmp_path):
    changes = {"learning_rate": 1, "lora.alpha": 3e19, "max_grad_norm": 0, "save_steps": 1, "warmup_ratio": 0.3}
    ended = warm.run("sft", course.words(tmp_path, **changes))

    told = one_line(ended)
    assert ended.code == 5
    assert "training left the finite numbers and nothing was registered" in told
    good = re.search(r"the last whole checkpoint is (checkpoint-\d+) in ", told)
    assert good is not None
    assert "--resume --allow-change learning_rate learning_rate=0.1" in told
    assert checkpoints(tmp_path)[-1] == good[1]
    assert versions(tmp_path) == []


def test_a_trained_tensor_that_is_not_finite_is_never_sealed(registry, tiny_base, demonstrations):
    import torch

    from align.training.loop import refuse_nonfinite_weights

    config = build(SftConfig, {"model": str(tiny_base), "data": str(demonstrations), "name": "x"})
    layer = torch.nn.Linear(2, 2)
    layer.weight.data[0, 0] = float("inf")
    with open_run(STAGE, config, registry, resume=False) as run:
        run.start()
        run.checkpoints.save(2, lambda folder: (folder / "state").write_text("good"))
        (run.folder / "checkpoint-4").mkdir()

        with pytest.raises(DivergedError, match=r"weight is not finite.*the last whole checkpoint is checkpoint-2"):
            refuse_nonfinite_weights(run, layer)

        assert checkpoints(registry.root) == ["checkpoint-2"]


@pytest.mark.parametrize("course", ["dpo"], indirect=True)
def test_ten_steps_without_any_gradient_end_with_code_5(warm, course, tmp_path):
    """With this beta every pair weighs nothing in single precision: the loss is ln 2 for ever."""
    ended = warm.run("dpo", course.words(tmp_path, beta=1e-60))

    told = one_line(ended)
    assert ended.code == 5
    assert "step 10: the gradient was exactly 0 for 10 steps in a row (loss 0.693147)" in told
    assert "align data preview" in told
    assert versions(tmp_path) == []


@one_stage
def test_memory_that_runs_out_ends_with_code_6_and_settings_that_keep_the_batch(warm, course, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text('{"prompt": "count", "completion": "%s"}\n' % ("nine blue eggs " * 250) * 64)
    changes = {"data": data, "per_device_train_batch_size": 32, "max_length": 1024, "on_long": "truncate_left"}

    ended = warm.run("sft", course.words(tmp_path / "registry", **changes), memory=150_000_000)

    told = one_line(ended)
    assert ended.code == 6
    assert "out of memory with per_device_train_batch_size=32 and max_length=1024: tried to allocate 268173312" in told
    assert "per_device_train_batch_size=16 gradient_accumulation_steps=2 gradient_checkpointing=true" in told


@pytest.mark.parametrize(
    ("size", "parts", "remedy"),
    [
        (8, 2, "per_device_train_batch_size=4 gradient_accumulation_steps=4 gradient_checkpointing=true"),
        (3, 1, "per_device_train_batch_size=1 gradient_accumulation_steps=3 gradient_checkpointing=true"),
        (7, 2, "per_device_train_batch_size=2 gradient_accumulation_steps=7 gradient_checkpointing=true"),
        (1, 4, "gradient_checkpointing=true"),
    ],
)
def test_the_remedy_for_a_full_accelerator_keeps_the_rows_of_a_step(size, parts, remedy):
    import torch

    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
    config = build(SftConfig, {"model": "m", "data": "d", "name": "n"} | sizes)

    found = out_of_memory(config, [], torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))

    assert found is not None
    assert f"try {remedy}" in str(found)
    assert "Tried to allocate 2.00 GiB" in str(found)


def test_with_checkpoints_the_remedy_is_a_resume():
    config = build(SftConfig, {"model": "m", "data": "d", "name": "n", "gradient_checkpointing": True})

    found = out_of_memory(config, ["checkpoint-4"], MemoryError())

    assert "(from checkpoint-4: add --resume --allow-change " in str(found)
    assert out_of_memory(config, [], RuntimeError("shapes differ")) is None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator:
    """Mounts file systems of a size; each is empty."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        target = tmp_path / f"disk{len(mounted)}"
        target.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", target]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let the test mount a file system")
        mounted.append(target)
        return target

    yield mount
    for target in mounted:
        subprocess.run(["umount", "-l", target], check=True)


@one_stage
def test_a_disk_that_fills_up_at_a_checkpoint_ends_with_code_6_and_keeps_the_whole_ones(warm, course, disk):
    root = disk(400)

    ended = warm.run("sft", course.words(root, save_steps=2, **{"lora.r": 4}))

    told = one_line(ended)
    assert ended.code == 6
    assert re.search(r"the disk is full, [\d,]+ bytes are free; nothing was registered", told)
    whole = re.search(r"whole checkpoints in \S+: (.+); free space and go on with the same command and --resume", told)
    assert whole is not None
    assert checkpoints(root) == whole[1].split(", ")
    assert versions(root) == []


@one_stage
def test_a_disk_that_fills_up_while_registering_ends_with_code_6_and_registers_nothing(warm, course, disk):
    root = disk(100)

    ended = warm.run("sft", course.words(root, save_steps=0, max_steps=2))

    told = one_line(ended)
    assert ended.code == 6
    assert "nothing was registered; whole checkpoints" in told
    assert [line["step"] for line in log_of(root)] == [1, 2]
    assert versions(root) == []
    assert list((root / "tmp").glob("*-*")) == []


@one_stage
def test_a_disk_too_small_for_its_checkpoints_is_refused_before_the_first_step(warm, course, disk):
    root = disk(300)

    ended = warm.run("sft", course.words(root, **{"lora.r": 32}))

    told = one_line(ended)
    assert ended.code == 6
    assert re.search(r"3 checkpoints of about 393 kB need 1.18 MB, \d+ kB is free; free space or choose another", told)
    assert list(root.glob("runs/*/*")) == []


@one_stage
def test_a_second_process_in_one_run_folder_is_told_who_holds_it(warm, course, tmp_path):
    first = warm.start("sft", course.words(tmp_path, max_steps=10**6))
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/*/checkpoint-*/align_checkpoint.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    second = warm.run("sft", course.words(tmp_path, "--resume", max_steps=10**6))
    first.send(signal.SIGKILL)

    assert second.code == 4
    assert f"process {first.pid} on {socket.gethostname()} is running in it" in one_line(second)
    assert first.wait().code == -signal.SIGKILL


@one_stage
def test_ctrl_c_saves_and_ends_with_code_130(warm, course, tmp_path):
    ended = warm.run("sft", course.words(tmp_path), signal=signal.SIGINT, at_step=6)

    assert ended.code == 130
    assert "stopping at the next safe point" in ended.err
    assert "stopped at step 7 of 20, saved in" in ended.err
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-7"]
    assert versions(tmp_path) == []


@one_stage
def test_a_second_ctrl_c_ends_at_once_and_names_what_is_whole(warm, course, tmp_path):
    again = {"signal": signal.SIGINT, "at_call": "trl.SFTTrainer._save_checkpoint", "count": 2}
    ended = warm.run("sft", course.words(tmp_path), signal=signal.SIGINT, at_step=6, then=again)

    assert ended.code == 130
    assert "error: interrupted; checkpoint-4 in " in ended.err
    assert "is whole; go on from it with the same command and --resume" in ended.err


@one_stage
def test_sigterm_while_the_model_is_loaded_ends_at_once_and_leaves_nothing(warm, course, tmp_path):
    ended = warm.run("sft", course.words(tmp_path), signal=signal.SIGTERM, at_call="align.models.adapters.load_base")

    assert ended.code == 75
    assert "stopped with nothing saved yet; start again with the same command" in one_line(ended)
    assert list(tmp_path.glob("runs/*/*")) == []


@one_stage
def test_sigterm_while_registering_lets_it_finish(warm, course, tmp_path):
    ended = warm.run(
        "sft", course.words(tmp_path), signal=signal.SIGTERM, at_call="align.training.register.draw_curves"
    )

    assert ended.code == 0, ended.err
    assert versions(tmp_path) == ["run/v0001"]


@one_stage
def test_sigterm_while_evaluating_finishes_the_evaluation_and_resumes_to_the_same_bits(warm, course, tmp_path):
    words = {"eval_data": course.held_out(tmp_path), "eval_steps": 4, "max_steps": 8}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert warm.run("sft", course.words(straight, **words)).code == 0

    ended = warm.run(
        "sft", course.words(stopped, **words), signal=signal.SIGTERM, at_call="transformers.Trainer.evaluation_loop"
    )

    assert ended.code == 75
    assert "stopped at step 4 of 8" in one_line(ended)
    assert "eval_loss" in log_of(stopped)[-1]
    assert warm.run("sft", course.words(stopped, "--resume", **words)).code == 0
    assert log_of(stopped) == log_of(straight)
    assert weights_of(stopped) == weights_of(straight)


@one_stage
def test_what_a_killed_run_wrote_explains_it(warm, course, tmp_path):
    assert warm.run("sft", course.words(tmp_path), signal=signal.SIGKILL, at_step=6).code == -signal.SIGKILL

    assert {"config.yaml", "run.json", "metrics.jsonl", "lock"} <= set(os.listdir(run_folder(tmp_path)))
    again = warm.run("sft", ["--registry", str(tmp_path), str(run_folder(tmp_path) / "config.yaml"), "--resume"])
    assert again.code == 0, again.err
    assert "resuming from step 4" in again.out


@one_stage
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("learning_rat", "--allow-change learning_rat: no such setting; did you mean learning_rate?"),
        ("lora.r", "--allow-change lora.r: what was saved depends on it"),
        ("model", "--allow-change model: what was saved depends on it"),
    ],
)
def test_what_cannot_change_cannot_be_allowed_to(warm, course, copied, field, message):
    ended = warm.run("sft", course.words(copied, "--resume", "--allow-change", field))

    assert ended.code == 2
    assert message in one_line(ended)


@one_stage
def test_an_allowed_change_lets_exactly_that_field_differ(warm, course, copied, straight):
    both = {"learning_rate": 1e-3, "seed": 7}

    ended = warm.run("sft", course.words(copied, "--resume", "--allow-change", "learning_rate", **both))
    assert ended.code == 4
    assert "(seed was 1, is 7); restore those settings, allow it with --allow-change seed" in one_line(ended)

    ended = warm.run("sft", course.words(copied, "--resume", "--allow-change", "learning_rate,seed", **both))
    assert ended.code == 0, ended.err
    before, now = ({line["step"]: line["learning_rate"] for line in log_of(root)} for root in (straight, copied))
    assert now == pytest.approx({step: rate if step <= 12 else rate / 10 for step, rate in before.items()})


@pytest.mark.slow
@one_stage
def test_two_changed_runs_of_one_name_do_not_meet(warm, course, copied, tmp_path):
    """The newest run is the one that --resume means, also when an older one could go on."""
    root = shutil.copytree(copied, tmp_path / "second")
    time.sleep(1)  # Folders are named by the second.
    assert warm.run("sft", course.words(root, seed=9)).code == 0

    ended = warm.run("sft", course.words(root, "--resume", seed=9))

    assert ended.code == 0, ended.err
    assert "already complete: run@v1" in ended.out


@one_stage
def test_a_broken_registry_at_the_usual_place_does_not_spoil_a_run_in_another_one(warm, course, tmp_path):
    """The line that says what to try next asks whether the registry is the usual one."""
    usual = tmp_path / "usual"
    usual.mkdir()
    (usual / "FORMAT.json").write_text("no json")

    root = tmp_path / "registry"
    ended = warm.run(course.stage, course.words(root, max_steps=2), environment={"ALIGN_REGISTRY": str(usual)})

    assert ended.code == 0, ended.err
    assert versions(root) == ["run/v0001"]
    assert "next: align dpo" in ended.out
    assert f"--registry {root}" in ended.out


@one_stage
def test_a_disk_that_is_full_once_the_version_is_there_is_a_warning(course, tmp_path, monkeypatch, capfd):
    def full(path: Path, content: bytes) -> None:
        if path.name == "finished.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_durably(path, content)

    monkeypatch.setattr("align.training.run.write_durably", full)
    words = course.words(tmp_path, max_steps=2)

    assert main(STAGE, words) == 0

    assert "run@v1 is registered, but its run folder" in capfd.readouterr().err
    assert versions(tmp_path) == ["run/v0001"]
    monkeypatch.undo()
    assert main(STAGE, [*words, "--resume"]) == 0
    assert "already complete: run@v1" in capfd.readouterr().out


@one_stage
def test_ctrl_c_once_the_version_is_there_ends_well(warm, course, tmp_path):
    ended = warm.run(
        course.stage, course.words(tmp_path, max_steps=2), signal=signal.SIGINT, at_call="align.training.run.Run.finish"
    )

    assert ended.code == 0, ended.err
    assert "warning: run@v1 is registered" in ended.err
    assert "registered run@v1" in ended.out
    assert versions(tmp_path) == ["run/v0001"]


@one_stage
def test_sigterm_the_moment_the_version_is_there_ends_well(warm, course, tmp_path):
    freeze = "align.registry.durable.freeze"
    ended = warm.run(course.stage, course.words(tmp_path, max_steps=2), signal=signal.SIGTERM, at_call=freeze)

    assert ended.code == 0, ended.err
    assert "registered run@v1" in ended.out
    assert versions(tmp_path) == ["run/v0001"]
