"""PPO in processes of its own: killed and resumed, and in two that learn what one would and register once."""

from __future__ import annotations

import json
import signal

import pytest
from aftermath import log_of, run_folder, versions, weights_of
from safetensors.torch import load_file
from test_ranks import run_two

from align.rl.shards import Shards


class PpoCourse:
    """Eight completions of four prompts a step, two optimiser steps of four, two passes."""

    stage = "ppo"

    def __init__(self, settings):
        self.settings = settings

    def words(self, root, *more, **changed):
        given = (self.settings | changed).items()
        return ["--registry", str(root), *(f"{key}={value}" for key, value in given), *more]


@pytest.fixture
def ppo_course(tiny_base, demonstrations):
    return PpoCourse({
        "model": tiny_base, "data": demonstrations, "name": "run", "bf16": "false", "max_length": 128, "max_steps": 3,
        "rollout_batch_size": 8, "per_device_train_batch_size": 4, "num_ppo_epochs": 2, "learning_rate": 2e-3,
        "sampling.max_new_tokens": 6, "sampling.num_generations": 2, "lora.r": 2, "save_steps": 1,
        "shaping.normalize_score": "true", "value": "head",
        "rewards": "[{name: length, args: {target: 8, unit: characters}}]",
    })  # fmt: skip


def samples_of(root):
    return [json.loads(line) for line in (run_folder(root) / "samples.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_learns_and_register_once(warm, ppo_course, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = warm.run("ppo", ppo_course.words(one))
    assert alone.code == 0, alone.err

    first, second = run_two(warm, ppo_course, ppo_course.words(two, per_device_train_batch_size=2))

    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "registered run@v1" in first.out
    assert "before the first update: KL 0, largest distance of a ratio from 1 0" in first.out
    assert second.out == ""
    assert versions(two) == ["run/v0001"]
    for theirs, ours in zip(log_of(one), log_of(two), strict=True):
        numbers = [key for key in theirs if "per_second" not in key]
        apart = {key: abs(ours[key] - theirs[key]) / (1 + abs(theirs[key])) for key in numbers}
        assert max(apart.values()) < 1e-5, apart
    for theirs, ours in zip(samples_of(one), samples_of(two), strict=True):
        assert ours["completion"] == theirs["completion"]
    left, right = (load_file(next(root.glob("models/run/v0001/*.safetensors"))) for root in (one, two))
    assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-5


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_a_run_that_nobody_touched(warm, ppo_course, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    words = {"adaptive_kl.target": 1.0, "shaping.whiten": "[scores, advantages]", "shaping.clip_score": 2.0}
    assert warm.run("ppo", ppo_course.words(straight, **words)).code == 0

    at_log = warm.run("ppo", ppo_course.words(killed, **words), signal=signal.SIGKILL, at_step=2)
    in_update = warm.run(
        "ppo", ppo_course.words(killed, "--resume", **words),
        signal=signal.SIGKILL, at_call="align.rl.shards.Shards.all_reduce_sum", count=6,
    )  # fmt: skip
    ended = warm.run("ppo", ppo_course.words(killed, "--resume", **words))

    assert (at_log.code, in_update.code, ended.code) == (-signal.SIGKILL, -signal.SIGKILL, 0), ended.err
    assert "resuming from step 1" in in_update.out
    assert "resuming from step 2" in ended.out
    assert weights_of(killed) == weights_of(straight)
    speeds = ("tokens_per_second/rollout", "tokens_per_second/scoring", "tokens_per_second/update")
    logs = [
        [{key: row[key] for key in row if key not in speeds} for row in log_of(root)] for root in (killed, straight)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_to_the_same_bits(warm, ppo_course, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    words = {"per_device_train_batch_size": 2}
    assert [run.code for run in run_two(warm, ppo_course, ppo_course.words(straight, **words))] == [0, 0]

    ended = run_two(
        warm, ppo_course, ppo_course.words(stopped, **words),
        signal=signal.SIGTERM, at_call="align.rl.shards.Shards.part", count=5,
    )  # fmt: skip

    assert [run.code for run in ended] == [75, 75], ended[0].err + ended[1].err
    ended = run_two(warm, ppo_course, ppo_course.words(stopped, "--resume", **words))
    assert [run.code for run in ended] == [0, 0], ended[0].err + ended[1].err
    assert weights_of(stopped) == weights_of(straight)


@pytest.mark.slow
def test_data_that_a_reward_cannot_judge_ends_both_processes(warm, ppo_course, tmp_path):
    rewards = "[{name: numeric_match}]"

    first, second = run_two(
        warm, ppo_course, ppo_course.words(tmp_path, rewards=rewards, per_device_train_batch_size=2)
    )

    assert (first.code, second.code) == (3, 3)
    assert versions(tmp_path) == []


def test_a_rollout_that_does_not_divide_among_the_processes_is_refused(warm, ppo_course, tmp_path):
    first, second = run_two(warm, ppo_course, ppo_course.words(tmp_path, per_device_train_batch_size=8))

    assert (first.code, second.code) == (2, 2)
    assert "8 is no multiple of the minibatch" in first.err
    assert "* 2 ranks = 16" in first.err


def test_the_parts_of_two_processes_are_the_rows_of_one_in_order():
    """Twelve rows in minibatches of six: each process has three of either."""
    parts = [Shards(index, 2).rows(12, 3) for index in range(2)]

    assert parts == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    joined = parts[0] + parts[1]
    assert [joined[place] for place in Shards(0, 2).order(6, 3)] == list(range(12))
