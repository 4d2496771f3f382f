"""Killed at any moment and resumed, a run of every stage ends with the bits of one that nobody touched.

The rows are those of two tables of measurements on plain TRL, where a torn newest checkpoint crashes every resume and a
lost optimizer or scheduler goes unnoticed. Every run is a process of its own and the kills are SIGKILL.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from aftermath import checkpoints, log_of, run_folder, versions, weights_of

SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("pretrain", "reward", "dpo")]
# What happens outside the stage's own trainer is tried with one stage by default and with all of them in slow tests.
one_stage = pytest.mark.parametrize("course", ["sft", *SLOW], indirect=True)

FILES = ("WEIGHTS", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "align_checkpoint.json")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "absent": Path.unlink,
    "zero bytes": lambda path: path.write_bytes(b""),
    "a bit flipped": flip_a_bit,
}


def damage(root: Path, checkpoint: str, file: str, how: str) -> None:
    folder = run_folder(root) / checkpoint
    path = next(folder.glob("*model.safetensors")) if file == "WEIGHTS" else folder / file
    DAMAGES[how](path)


def test_killed_three_times_and_resumed_equals_uninterrupted(warm, course, straight, copied):
    """Resumed from the middle of the first epoch, from its end, and from the middle of the second."""
    ended = warm.run(course.stage, course.words(copied, "--resume"))

    assert ended.code == 0, ended.err
    assert "\nresuming from step 12\n" in ended.out
    log = log_of(straight)
    assert [line["epoch"] for line in log if line["step"] in (4, 8, 12)] == [0.5, 1.0, 1.5]
    assert log_of(copied) == log
    assert weights_of(copied) == weights_of(straight)


@pytest.mark.parametrize("course", ["sft"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": "true", "max_length": 96, "per_device_train_batch_size": 4},
        {"lora": "none", "lora.r": None, "lora.dropout": None},
        pytest.param(
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "gradient_checkpointing": "true"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["packing", "every weight", "accumulation"],
)
def test_other_ways_to_train_resume_to_the_same_bits_too(warm, course, tmp_path, settings):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert warm.run("sft", course.words(straight, **settings)).code == 0
    ended = warm.run("sft", course.words(killed, **settings), signal=signal.SIGKILL, at_step=14)
    assert ended.code == -signal.SIGKILL, ended.err

    ended = warm.run("sft", course.words(killed, "--resume", **settings))

    assert ended.code == 0, ended.err
    assert "\nresuming from step 12\n" in ended.out
    assert log_of(killed)[11]["epoch"] not in (0.5, 1.0, 2.0)
    assert log_of(killed) == log_of(straight)
    assert weights_of(killed) == weights_of(straight)


def goes_back(warm, course, straight, root, file: str, how: str) -> None:
    damage(root, "checkpoint-12", file, how)

    ended = warm.run(course.stage, course.words(root, "--resume"))

    assert ended.code == 0, ended.err
    assert "checkpoint-12.torn: it is incomplete or damaged" in ended.out
    assert "going back to and resuming from step 8\n" in ended.out
    assert checkpoints(root) == ["checkpoint-16", "checkpoint-20", "checkpoint-12.torn"]
    assert log_of(root) == log_of(straight)
    assert weights_of(root) == weights_of(straight)


def test_from_a_torn_newest_checkpoint_it_goes_back_to_the_one_before(warm, course, straight, copied):
    """Plain TRL takes weights with a bit flipped without a word."""
    goes_back(warm, course, straight, copied, "WEIGHTS", "a bit flipped")


@one_stage
def test_a_checkpoint_that_lost_its_optimizer_is_torn_too(warm, course, straight, copied):
    """Plain TRL starts with a new optimizer and the first learning rate, silently."""
    goes_back(warm, course, straight, copied, "optimizer.pt", "absent")


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_from_any_damage_to_any_file_it_goes_back(warm, course, straight, copied, file, how):
    goes_back(warm, course, straight, copied, file, how)


def test_with_every_checkpoint_torn_it_ends_with_code_4_and_loses_nothing(warm, course, copied):
    for checkpoint in ("checkpoint-8", "checkpoint-12"):
        damage(copied, checkpoint, "scheduler.pt", "truncated")
    log = log_of(copied)

    for _ in range(2):  # A queue starts the same command again and again.
        ended = warm.run(course.stage, course.words(copied, "--resume"))

        assert ended.code == 4
        assert "no checkpoint is whole" in ended.err
        assert ended.err.count("\n") == 1
        assert checkpoints(copied) == ["checkpoint-8.torn", "checkpoint-12.torn"]
        assert log_of(copied) == log
        assert versions(copied) == []


@one_stage
@pytest.mark.parametrize(
    "call", ["torch.save", pytest.param("align.training.checkpoints.seal", marks=pytest.mark.slow)]
)
def test_killed_while_a_checkpoint_is_written(warm, course, straight, tmp_path, call):
    """Before the last of its files, the random states; and before the seal."""
    ended = warm.run(
        course.stage, course.words(tmp_path), signal=signal.SIGKILL, at_call=call, count=6 if "torch" in call else 2
    )
    assert ended.code == -signal.SIGKILL, ended.err
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-8"]

    ended = warm.run(course.stage, course.words(tmp_path, "--resume"))

    assert ended.code == 0, ended.err
    assert "going back to and resuming from step 4\n" in ended.out
    assert log_of(tmp_path) == log_of(straight)
    assert weights_of(tmp_path) == weights_of(straight)


@one_stage
def test_killed_before_its_first_checkpoint_it_starts_over(warm, course, straight, tmp_path):
    assert warm.run(course.stage, course.words(tmp_path), signal=signal.SIGKILL, at_step=3).code == -signal.SIGKILL

    ended = warm.run(course.stage, course.words(tmp_path, "--resume"))

    assert ended.code == 0, ended.err
    assert "no checkpoint yet; starting at step 0" in ended.out
    assert log_of(tmp_path) == log_of(straight)
    assert weights_of(tmp_path) == weights_of(straight)


@one_stage
def test_killed_while_registering_it_trains_no_step_more(warm, course, straight, tmp_path):
    """Plain TRL takes a thirteenth step of twelve here."""
    ended = warm.run(
        course.stage, course.words(tmp_path), signal=signal.SIGKILL, at_call="align.training.register.draw_curves"
    )
    assert ended.code == -signal.SIGKILL, ended.err
    assert versions(tmp_path) == []

    ended = warm.run(course.stage, course.words(tmp_path, "--resume"))

    assert ended.code == 0, ended.err
    assert "training is already complete" in ended.out
    assert log_of(tmp_path) == log_of(straight)
    assert weights_of(tmp_path) == weights_of(straight)
    summaries = [next(root.glob("models/run/v0001/summary.json")).read_text() for root in (tmp_path, straight)]
    assert summaries[0] == summaries[1]


@one_stage
def test_killed_between_registering_and_saying_so_it_registers_once(warm, course, tmp_path):
    ended = warm.run(
        course.stage, course.words(tmp_path), signal=signal.SIGKILL, at_call="align.training.run.Run.finish"
    )
    assert ended.code == -signal.SIGKILL, ended.err
    assert versions(tmp_path) == ["run/v0001"]

    ended = warm.run(course.stage, course.words(tmp_path, "--resume"))

    assert ended.code == 0, ended.err
    assert "already complete: run@v1" in ended.out
    assert versions(tmp_path) == ["run/v0001"]


@one_stage
def test_a_finished_run_is_left_alone(warm, course, straight, tmp_path):
    root = shutil.copytree(straight, tmp_path / "registry")
    before = {path: path.stat().st_mtime_ns for path in run_folder(root).rglob("*") if path.name != "lock"}

    ended = warm.run(course.stage, course.words(root, "--resume"))

    assert ended.code == 0, ended.err
    assert "already complete: run@v1" in ended.out
    assert {path: path.stat().st_mtime_ns for path in run_folder(root).rglob("*") if path.name != "lock"} == before
    assert versions(root) == ["run/v0001"]


def test_stopped_by_sigterm_and_resumed_equals_uninterrupted(warm, course, straight, tmp_path):
    """Stopped where no line is due: lines of three steps each, stopped after step 10."""
    words = course.words(tmp_path, logging_steps=3)
    ended = warm.run(course.stage, words, signal=signal.SIGTERM, at_step=9)

    assert ended.code == 75
    assert "stopped at step 10 of 20" in ended.err
    assert ended.err.count("\n") == 1
    assert versions(tmp_path) == []
    assert checkpoints(tmp_path) == ["checkpoint-8", "checkpoint-10"]
    assert [line["step"] for line in log_of(tmp_path)] == [3, 6, 9]

    ended = warm.run(course.stage, [*words, "--resume"])

    assert ended.code == 0, ended.err
    assert "\nresuming from step 10\n" in ended.out
    assert weights_of(tmp_path) == weights_of(straight)
    steps = [line["loss"] for line in log_of(straight)]
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    assert [line["loss"] for line in lines] == [
        sum(steps[first:last]) / (last - first) for first, last in [(n, min(n + 3, 20)) for n in range(0, 20, 3)]
    ]
    assert lines[-1]["num_tokens"] == log_of(straight)[-1]["num_tokens"]


CHANGES = [
    ({"learning_rate": 1e-3}, "learning_rate was 0.01, is 0.001"),
    ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was "),
    ({"seed": 7}, "seed was 1, is 7"),
    ({"lora.alpha": 64}, "lora.alpha was 32.0, is 64.0"),
    ({"lora.r": 4}, "lora.r was 2, is 4"),
]


@one_stage
@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_a_changed_setting_is_refused_by_name(warm, course, copied, change, told):
    if course.stage == "pretrain" and "lora" in told:
        return  # A new model has no adapter, so the setting is refused as such.

    ended = warm.run(course.stage, course.words(copied, "--resume", **change))

    assert ended.code == 4
    assert told in ended.err
    assert ended.err.count("\n") == 1
    assert checkpoints(copied) == ["checkpoint-8", "checkpoint-12"]


@one_stage
def test_changed_content_of_the_same_file_is_refused(warm, course, tmp_path):
    source, limit, part = str(course.settings["data"]).partition(":")
    content, data = Path(source).read_text(), tmp_path / "data.jsonl"
    data.write_text(content)
    root, settings = tmp_path / "registry", {"data": f"{data}{limit}{part}"}
    assert warm.run(course.stage, course.words(root, **settings), signal=signal.SIGKILL, at_step=5).code == -9
    data.write_text(content.replace("blue", "grey"))

    ended = warm.run(course.stage, course.words(root, "--resume", **settings))

    assert ended.code == 4
    assert "data[0] was 'data.jsonl" in ended.err
    assert "--allow-change data" in ended.err


@one_stage
def test_other_versions_of_the_libraries_are_refused(warm, course, copied):
    path = run_folder(copied) / "run.json"
    identity = json.loads(path.read_text())
    identity["versions"]["torch"] = "2.6.0"
    path.write_text(json.dumps(identity))

    ended = warm.run(course.stage, course.words(copied, "--resume"))

    assert ended.code == 4
    assert "versions.torch was '2.6.0'" in ended.err
