"""What `--resume` goes on with, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

from align import dpo, sft
from align.registry import open_registry
from align.training.command import main
from align.training.run_log import RunLog


def line(root: Path, **settings: object) -> list[str]:
    fixed = {
        "learning_rate": 1e-2, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "bf16": "false", "lora.r": 2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    return ["--registry", str(root), *(f"{key}={value}" for key, value in (fixed | settings).items())]


def cut_at(monkeypatch, step: int):
    """Make runs end as by Ctrl-C when they log this step."""
    write = RunLog.write

    def cut(self, now, numbers):
        if now == step:
            raise KeyboardInterrupt
        write(self, now, numbers)

    monkeypatch.setattr(RunLog, "write", cut)


def test_a_start_that_has_got_a_newer_version_is_refused(
    tmp_path, tiny_base, demonstrations, preferences, monkeypatch, capsys
):
    start = line(tmp_path, model=tiny_base, data=demonstrations, name="start")
    assert main(sft.STAGE, start) == 0
    words = line(tmp_path, model="start", data=preferences, name="moved")
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        assert main(dpo.STAGE, words) == 130
    assert main(sft.STAGE, [*start, "seed=5"]) == 0

    assert main(dpo.STAGE, [*words, "--resume"]) == 4

    told = capsys.readouterr().err
    assert "start@v1" in told
    assert "start@v2" in told


def test_changed_settings_are_refused_before_anything_is_overwritten(
    tmp_path, tiny_base, demonstrations, monkeypatch, capsys
):
    words = line(tmp_path, model=tiny_base, data=demonstrations, name="changed")
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        assert main(sft.STAGE, words) == 130
    written = next((tmp_path / "runs" / "changed").glob("*/config.yaml"))
    before = written.read_text()

    assert main(sft.STAGE, [*words, "learning_rate=1e-5", "--resume"]) == 4

    assert "learning_rate was 0.01, is 1e-05" in capsys.readouterr().err
    assert written.read_text() == before


def test_a_finished_run_with_other_settings_is_refused(tmp_path, tiny_base, demonstrations, capsys):
    words = line(tmp_path, model=tiny_base, data=demonstrations, name="whole")
    assert main(sft.STAGE, words) == 0

    assert main(sft.STAGE, [*words, "max_steps=8", "--resume"]) == 4

    assert "max_steps was 6, is 8" in capsys.readouterr().err


def test_a_failed_attempt_in_between_does_not_hide_the_work(tmp_path, tiny_base, demonstrations, monkeypatch, capsys):
    words = line(tmp_path, model=tiny_base, data=demonstrations, name="hidden")
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        assert main(sft.STAGE, words) == 130
    assert main(sft.STAGE, [*words, "data=absent.jsonl"]) == 3
    with monkeypatch.context() as patch:
        cut_at(patch, 2)
        assert main(sft.STAGE, words) == 130

    assert main(sft.STAGE, [*words, "--resume"]) == 0

    assert "resuming from step 4" in capsys.readouterr().out


def test_a_finished_run_with_other_settings_in_between_does_not_hide_the_work(
    tmp_path, tiny_base, demonstrations, monkeypatch, capsys
):
    words = line(tmp_path, model=tiny_base, data=demonstrations, name="between")
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        assert main(sft.STAGE, words) == 130
    assert main(sft.STAGE, [*words, "max_steps=2", "warmup_ratio=0"]) == 0

    assert main(sft.STAGE, [*words, "--resume"]) == 0
    assert "resuming from step 4" in capsys.readouterr().out
    assert main(sft.STAGE, [*words, "--resume"]) == 0
    assert "already complete: between@v2" in capsys.readouterr().out


def test_a_run_that_fails_before_it_logs_leaves_no_folder(tmp_path, tiny_base):
    assert main(sft.STAGE, line(tmp_path, model=tiny_base, data="absent.jsonl", name="empty")) == 3

    assert list((tmp_path / "runs").rglob("*.yaml")) == []


def test_a_reader_that_goes_away_does_not_stop_training(warm, tmp_path, tiny_base, demonstrations):
    words = line(tmp_path, model=tiny_base, data=demonstrations, name="piped")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    run = warm.start("sft", words, out=pipe)
    with pipe.open() as reader:
        reader.readline()
    ended = run.wait()

    assert ended.code == 0, ended.err
    assert open_registry(tmp_path).names() == ["piped"]
