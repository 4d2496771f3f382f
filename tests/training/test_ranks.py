"""One run in two processes: one folder, one log, one version, the losses of one process; and nothing when one dies."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
from aftermath import checkpoints, log_of, versions, weights_of
from safetensors.torch import load_file

from align.errors import UsageError
from align.training.ranks import Ranks, join_ranks

one_stage = pytest.mark.parametrize("course", ["sft"], indirect=True)
SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("pretrain", "reward", "dpo")]
PLAIN = {"lora.dropout": None, "max_steps": 8}


def free_port() -> int:
    """One below those that systems hand out of their own accord: nobody takes it before the run does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as asked, suppress(OSError):
            asked.bind(("127.0.0.1", port))
            return port


def run_two(warm, course, words: list[str], **second) -> list:
    """Run a stage in two processes as torchrun would start them; `second` is the plan of the second."""
    port = str(free_port())
    started = []
    for rank, plan in enumerate(({}, second)):
        environment = {
            "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        started.append(warm.start(course.stage, words, environment=environment, **plan))
    return [run.wait() for run in reversed(started)][::-1]


@pytest.mark.parametrize("course", ["sft", *SLOW], indirect=True)
def test_two_processes_register_once_and_learn_what_one_learns(warm, course, tmp_path):
    plain = {key: value for key, value in PLAIN.items() if key in course.settings}
    size = 10 if course.stage == "pretrain" else 8
    one, two = tmp_path / "one", tmp_path / "two"
    assert warm.run(course.stage, course.words(one, **plain, per_device_train_batch_size=size)).code == 0

    first, second = run_two(warm, course, course.words(two, **plain, per_device_train_batch_size=size // 2))

    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "registered run@v1" in first.out
    assert second.out == ""
    assert versions(two) == ["run/v0001"]
    assert len(list(two.glob("runs/run/*"))) == 1
    assert [line["step"] for line in log_of(two)] == [line["step"] for line in log_of(one)]
    for theirs, ours in zip(log_of(one), log_of(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["num_tokens"] == theirs["num_tokens"]
    left, right = (load_file(next(root.glob("models/run/v0001/*.safetensors"))) for root in (one, two))
    assert all(bool((left[key] - right[key]).abs().max() < 1e-4) for key in left)


@one_stage
def test_a_killed_process_ends_the_run_and_both_resume_to_the_same_bits(warm, course, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    words = {"max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 3}
    assert [run.code for run in run_two(warm, course, course.words(straight, **words))] == [0, 0]

    # Only the first logs, so the second is killed at its fourth optimiser step.
    first, second = run_two(
        warm, course, course.words(killed, **words),
        signal=signal.SIGKILL, at_call="transformers.Trainer.training_step", count=5,
    )  # fmt: skip

    assert second.code == -signal.SIGKILL
    assert first.code == 6
    assert "process 0 of 2: another process of this run ended; nothing was registered" in first.err
    assert versions(killed) == []
    alone = warm.run("sft", course.words(killed, "--resume", **words))
    assert alone.code == 4
    assert "world_size was 2, is 1" in alone.err
    first, second = run_two(warm, course, course.words(killed, "--resume", **words))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "resuming from step 3" in first.out
    assert log_of(killed) == log_of(straight)
    assert weights_of(killed) == weights_of(straight)


@one_stage
def test_a_rank_that_dies_while_rank_0_registers_does_not_spoil_the_version(warm, course, tmp_path):
    words = course.words(tmp_path, max_steps=2, per_device_train_batch_size=4)

    first, second = run_two(
        warm, course, words, signal=signal.SIGKILL, at_call="align.training.register.register", count=1
    )

    assert second.code == -signal.SIGKILL
    assert first.code == 0, first.err
    assert "registered run@v1" in first.out
    assert versions(tmp_path) == ["run/v0001"]


@one_stage
def test_rank_0_alone_tokenises_and_the_others_read(warm, course, tmp_path):
    words = course.words(tmp_path, max_steps=2, per_device_train_batch_size=4, eval_data=course.held_out(tmp_path))

    first, second = run_two(
        warm, course, words, signal=signal.SIGKILL, at_call="align.data.tokenise._write_rows", count=1
    )

    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "tokenised before" not in first.out


@one_stage
def test_data_that_rank_0_cannot_tokenise_ends_all_ranks_with_its_message(warm, course, tmp_path):
    first, second = run_two(warm, course, course.words(tmp_path, max_steps=2, max_length=16))

    assert (first.code, second.code) == (3, 3), first.err + second.err
    for run in (first, second):
        assert "0 are left (longer than max_length: 64)" in run.err
    assert versions(tmp_path) == []


@pytest.mark.slow
@one_stage
def test_sigterm_to_one_process_stops_both_at_one_step(warm, course, tmp_path):
    first, second = run_two(
        warm,
        course,
        course.words(tmp_path),
        signal=signal.SIGTERM,
        at_call="transformers.Trainer.training_step",
        count=5,
    )

    assert (first.code, second.code) == (75, 75), first.err + second.err
    assert "stopped at step 5 of 20" in first.err
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    assert versions(tmp_path) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2: this is one process on its own \(RANK, LOCAL_RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: "),
        ({"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP: sharded training is not supported"),
    ],
)
def test_processes_that_were_asked_for_and_did_not_come_are_missed(environment, message):
    with pytest.raises(UsageError, match=message):
        join_ranks(environment)


def test_one_process_is_the_default():
    assert join_ranks({}) == join_ranks({"WORLD_SIZE": "1", "RANK": "0"}) == Ranks()
    assert Ranks().from_rank_zero(lambda: 3) == 3
    assert Ranks().any(True)


@pytest.mark.slow
@one_stage
def test_torchrun_starts_a_run(course, tmp_path):
    words = course.words(tmp_path, per_device_train_batch_size=4, max_steps=4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "align.sft"]

    done = subprocess.run(
        [*launch, *words], capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("registered run@v1") == 1
    assert versions(tmp_path) == ["run/v0001"]
