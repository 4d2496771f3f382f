"""Gold rewards: measured on every rollout, seen by nothing that is trained."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from align.config import build
from align.errors import DataError, UsageError
from align.ppo import PpoConfig
from align.rewards import reward
from align.rewards.weighted_rewards import RewardSettings
from align.rl.gold import GoldRewards, draw_against_kl, read_points
from align.schema import Record
from align.training.curves import draw_curves

RECORDS = [Record(answer="1", source="a.jsonl", line=1), Record(answer="2", source="a.jsonl", line=2)]
LENGTH = RewardSettings(name="length", args={"target": 2})


def test_gold_is_the_mean_of_the_weighted_sum():
    gold = GoldRewards([RewardSettings(name="exact_match", weight=2.0), LENGTH])

    assert gold.measure(RECORDS, ["1", "1"]) == {"gold_mean": 1.5, "gold/exact_match": 0.5, "gold/length": 0.5}


def test_one_gold_reward_is_logged_once_and_none_not_at_all(tmp_path):
    assert GoldRewards([LENGTH]).measure(RECORDS, ["a b", "a"]) == {"gold_mean": 0.75}
    assert GoldRewards([]).measure(RECORDS, ["a b", "a"]) == {}
    assert GoldRewards([]).panels(tmp_path / "metrics.jsonl") == ()


def test_a_gold_reward_that_draws_random_numbers_leaves_those_of_the_training():
    @reward
    def draws_in_this_test(record, completion):
        torch.manual_seed(5)
        return random.random() + numpy.random.random() + float(torch.rand(()))

    def drawn():
        return random.random(), numpy.random.random(), float(torch.rand(()))

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(3)
    expected = drawn()
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(3)
    GoldRewards([RewardSettings(name="draws_in_this_test")]).measure(RECORDS, ["a", "b"])

    assert drawn() == expected


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ({"name": "lenght"}, "gold: asked for 'lenght'; no reward has that name; did you mean length"),
        ({"name": "length", "args": {"target": 0}}, "gold: length: target: should be greater than 0, found 0"),
        ({"name": "length", "args": {"goal": 2}}, "gold: length: got an unexpected|gold: length: missing"),
    ],
)
def test_a_gold_reward_that_cannot_work_is_refused_when_the_settings_are_read(gold, message):
    settings = {"model": "m", "data": "d", "name": "n", "reward_model": "r", "gold": [gold]}

    with pytest.raises(UsageError, match=message):
        build(PpoConfig, settings)


def test_gold_alone_is_nothing_to_optimise():
    with pytest.raises(UsageError, match="nothing to optimise"):
        build(PpoConfig, {"model": "m", "data": "d", "name": "n", "gold": [LENGTH.model_dump()]})


def test_a_record_without_the_field_a_gold_reward_needs_is_named():
    with pytest.raises(DataError, match=r"exact_match: needs the field answer; a\.jsonl:3 has none"):
        GoldRewards([RewardSettings(name="exact_match")]).load(None, [*RECORDS, Record(source="a.jsonl", line=3)])


def write_log(folder, rows):
    log = folder / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": step} | row) + "\n" for step, row in enumerate(rows, start=1)))
    return log


def test_proxy_and_gold_are_drawn_over_kl_on_scales_of_their_own(tmp_path):
    rows = [{"kl": kl, "score_mean": 8 * kl, "gold_mean": kl - kl**2 / 4} for kl in (3.0, 0.0, 2.0, 1.0)]
    log = write_log(tmp_path, [*rows, {"loss": 1.0}])
    axes = Figure().add_subplot()

    draw_against_kl(axes, log)

    assert read_points(log) == [(3.0, 24.0, 0.75), (0.0, 0.0, 0.0), (2.0, 16.0, 1.0), (1.0, 8.0, 0.75)]
    curves = [one.get_lines()[0].get_xydata().tolist() for one in axes.figure.axes]
    assert curves[0] == [[0, 0], [1, 8], [2, 16], [3, 24]]
    assert curves[1] == [[0, 0], [1, 0.75], [2, 1], [3, 0.75]]
    assert [one.get_ylabel() for one in axes.figure.axes] == ["proxy", "gold"]


@pytest.mark.parametrize("count", [0, 1, 200])
def test_a_log_of_any_length_is_drawn_beside_the_other_curves(tmp_path, count):
    log = write_log(tmp_path, [{"kl": step / 9, "score_mean": step, "gold_mean": 0.5} for step in range(count)])

    draw_curves(log, tmp_path / "curves.png", title="ppo: x", more=GoldRewards([LENGTH]).panels(log))

    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width >= 300
