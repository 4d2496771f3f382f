from __future__ import annotations

import json

import pytest
from PIL import Image

from align.training.curves import draw_curves, panels, read_log


def test_every_logged_series_is_read_with_its_steps(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0, "epoch": 0.1}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert read_log(log) == {"loss": ([1, 2], [2.0, 1.0]), "eval_loss": ([2], [1.5])}


def test_curves_are_a_picture_with_ink(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": i, "loss": 5 / i, "kl": i}) + "\n" for i in range(1, 9)))

    draw_curves(log, tmp_path / "curves.png", title="sft: x")

    picture = Image.open(tmp_path / "curves.png").convert("L")
    assert picture.width > 400
    low, high = picture.getextrema()
    assert low < 100 < 200 < high


def test_training_and_held_out_values_share_a_panel(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 1, "eval_loss": 1.5, "eval_runtime": 3.0}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert panels(read_log(log)) == {
        "loss": {"training": ([1], [2.0]), "held out": ([1], [1.5])},
        "grad_norm": {"training": ([1], [1.0])},
    }


@pytest.mark.parametrize("rows", [[{"step": 7, "loss": 2.0}], [{"step": 3, "eval_loss": 1.0}], [{"step": 1}]])
def test_a_short_log_is_drawn_too(tmp_path, rows):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))

    draw_curves(log, tmp_path / "curves.png", title="sft: x")

    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width >= 300
