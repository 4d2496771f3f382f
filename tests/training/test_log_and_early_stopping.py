"""What a run writes while it trains, and how it stops by itself when it gets no better."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from aftermath import checkpoints, log_of, run_folder, versions, weights_of
from safetensors.torch import load_file

one_stage = pytest.mark.parametrize("course", ["sft"], indirect=True)
SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("pretrain", "reward", "dpo")]
some_stages = pytest.mark.parametrize("course", ["sft", *SLOW], indirect=True)


def raw_log(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder(root) / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_logged_with_what_the_contract_names(course, straight):
    lines = raw_log(straight)

    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        assert line.keys() >= {"step", "loss", "learning_rate", "tokens_per_second", "grad_norm", "epoch", "num_tokens"}
        assert line["tokens_per_second"] > 0
    tokens = [line["num_tokens"] for line in lines]
    assert tokens == sorted(set(tokens))


def test_a_pretraining_step_counts_every_token_of_its_blocks(straight, course):
    if course.stage == "pretrain":
        assert log_of(straight)[0]["num_tokens"] == 11 * 16


class Early:
    """A run with early stopping, and where it stopped."""

    def __init__(self, warm, course, folder: Path) -> None:
        self.root = folder / "straight"
        self.settings = {
            "eval_data": course.held_out(folder), "eval_steps": 1, "early_stopping_patience": 3, "max_steps": 60,
            "learning_rate": 0.1, "lr_scheduler_type": "constant", "save_steps": 5, "warmup_ratio": 0,
        }  # fmt: skip
        ended = warm.run(course.stage, course.words(self.root, **self.settings))
        assert ended.code == 0, ended.err
        self.out = ended.out
        losses = {line["step"]: line["eval_loss"] for line in log_of(self.root) if "eval_loss" in line}
        self.best = min(losses, key=losses.__getitem__)
        self.last = max(losses)
        self.loss = losses[self.best]


@pytest.fixture(scope="module")
def early(warm, course, tmp_path_factory) -> Early:
    return Early(warm, course, tmp_path_factory.mktemp(f"early-{course.stage}"))


@some_stages
def test_a_run_that_gets_no_better_stops_and_registers_its_best_step(warm, course, early):
    assert early.last == early.best + 3 < 60
    assert "stopped early after 3 evaluations without a lower eval_loss; the best eval_loss is" in early.out
    best = next((run_folder(early.root) / f"checkpoint-{early.best}").glob("*model.safetensors"))
    taken, saved = load_file(next(early.root.glob("models/run/v0001/*model.safetensors"))), load_file(best)
    assert taken.keys() == saved.keys()
    assert all(torch.equal(taken[key], saved[key]) for key in saved)
    summary = json.loads((early.root / "models/run/v0001/summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(early.loss)


@some_stages
def test_the_best_checkpoint_outlives_the_rotation(warm, course, early):
    kept = checkpoints(early.root)

    assert f"checkpoint-{early.best}" in kept
    assert f"checkpoint-{early.last}" in kept
    assert 2 <= len(kept) <= 3


@some_stages
def test_a_run_killed_while_it_waits_for_better_stops_where_it_would_have(warm, course, early, tmp_path):
    words = course.words(tmp_path, **early.settings)
    ended = warm.run(course.stage, words, signal=signal.SIGKILL, at_step=early.best + 2)
    assert ended.code == -signal.SIGKILL, ended.err

    ended = warm.run(course.stage, [*words, "--resume"])

    assert ended.code == 0, ended.err
    assert log_of(tmp_path) == log_of(early.root)
    assert weights_of(tmp_path) == weights_of(early.root)


@one_stage
def test_a_run_killed_after_it_stopped_early_only_registers(warm, course, early, tmp_path):
    words = course.words(tmp_path, **early.settings)
    register = "align.training.register.draw_curves"
    assert warm.run(course.stage, words, signal=signal.SIGKILL, at_call=register).code == -signal.SIGKILL

    ended = warm.run(course.stage, [*words, "--resume"])

    assert ended.code == 0, ended.err
    assert "training is already complete" in ended.out
    assert log_of(tmp_path) == log_of(early.root)
    assert weights_of(tmp_path) == weights_of(early.root)


@one_stage
def test_without_its_best_checkpoint_a_run_that_watches_for_it_is_not_resumed(warm, course, early, tmp_path):
    words = course.words(tmp_path, **early.settings | {"save_steps": 1})
    assert warm.run(course.stage, words, signal=signal.SIGKILL, at_step=early.last).code == -signal.SIGKILL
    shutil.rmtree(run_folder(tmp_path) / f"checkpoint-{early.best}")

    ended = warm.run(course.stage, [*words, "--resume"])

    assert ended.code == 4
    assert f"checkpoint-{early.best}: is needed and not whole" in ended.err
    assert versions(tmp_path) == []


@one_stage
def test_tensorboard_reads_back_the_log_of_a_run_that_was_killed_and_resumed(warm, course, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = course.words(tmp_path, report_to="[tensorboard]", max_steps=8)
    assert warm.run(course.stage, words, signal=signal.SIGKILL, at_step=6).code == -signal.SIGKILL
    assert warm.run(course.stage, [*words, "--resume"]).code == 0

    reader = EventAccumulator(str(run_folder(tmp_path) / "events"))
    reader.Reload()

    lines = log_of(tmp_path)
    for key in ("loss", "learning_rate", "grad_norm"):
        points = [(event.step, event.value) for event in reader.Scalars(key)]
        assert points == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]


@one_stage
def test_evaluating_more_often_is_no_silent_change(warm, course, tmp_path):
    """An evaluation draws random numbers, so with dropout it changes what is trained after it."""
    settings = {"eval_data": course.held_out(tmp_path), "eval_steps": 4, "max_steps": 8}
    root = tmp_path / "registry"
    words = course.words(root, **settings)
    assert warm.run(course.stage, words, signal=signal.SIGKILL, at_step=6).code == -signal.SIGKILL

    ended = warm.run(course.stage, course.words(root, "--resume", **settings | {"eval_steps": 2}))

    assert ended.code == 4
    assert "eval_steps was 4, is 2" in ended.err
