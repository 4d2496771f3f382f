"""What a PPO run keeps beside its log."""

from __future__ import annotations

import json

import pytest

from align.rl.rollout_log import drop_samples_after

ROWS = [{"step": step, "completion": "一\u2028two\x85"} for step in (1, 2, 3)]
LINES = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]


def kept(folder):
    return [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("torn", [LINES[2][:9], LINES[2][:28], b"\x00" * 40, b"", b"\n"])
def test_a_torn_last_sample_is_dropped(tmp_path, torn):
    (tmp_path / "samples.jsonl").write_bytes(b"".join(LINES[:2]) + torn)

    drop_samples_after(tmp_path, step=3)

    assert (tmp_path / "samples.jsonl").read_bytes() == b"".join(LINES[:2])


def test_samples_after_the_checkpoint_are_forgotten(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(b"".join(LINES))

    drop_samples_after(tmp_path, step=2)

    assert kept(tmp_path) == [1, 2]


def test_a_sample_that_lost_only_its_line_end_is_kept_apart_from_the_next(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(b"".join(LINES).rstrip(b"\n"))

    drop_samples_after(tmp_path, step=3)

    assert (tmp_path / "samples.jsonl").read_bytes() == b"".join(LINES)


def test_a_run_without_samples_has_none_to_forget(tmp_path):
    drop_samples_after(tmp_path, step=3)

    assert not list(tmp_path.glob("*.jsonl")) or not kept(tmp_path)
