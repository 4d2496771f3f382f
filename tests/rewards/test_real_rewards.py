"""Reward models on real preference data: a tiny random base learns next to nothing, and the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from align import reward
from align.data.load import load_records, open_scan
from align.data.record_sets import refuse_leak
from align.data.split import split_records
from align.registry import open_registry
from align.training.command import main

PANDALM = """
source: {path}
format: pairs
columns:
  prompt: instruction
  input: input
  a: response1
  b: response2
  label: [annotator1, annotator2, annotator3]
label_map: {{"0": tie, "1": a, "2": b}}
ties: {ties}
license: Apache-2.0
language: en
description: Pairs of answers judged by three people.
"""


def split(spec: str, folder: Path, share: float) -> tuple[Path, Path]:
    split_records(open_scan(spec, view="preference", on_bad_row="skip"), folder, share)
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    refuse_leak(load_records(str(train)), load_records(str(held_out)))
    return train, held_out


def run(root: Path, base: Path, halves: tuple[Path, Path], *words: str) -> dict[str, float]:
    line = [
        f"model={base}", f"data={halves[0]}", f"eval_data={halves[1]}", "name=judge", "bf16=false", "lora.r=4",
        "max_length=512", "on_long=drop", "per_device_train_batch_size=8", "logging_steps=4", "save_steps=0",
        "learning_rate=1e-4", *words,
    ]  # fmt: skip
    assert main(reward.STAGE, ["--registry", str(root), *line]) == 0
    return open_registry(root).resolve("judge").manifest["metrics"]


def require_honest(numbers: dict[str, float]) -> None:
    """Near chance, within an interval that is as wide as so few pairs make it."""
    assert numbers["held_out_accuracy_low"] - 0.08 < 0.5 < numbers["held_out_accuracy_high"] + 0.08, numbers
    assert (
        1.5
        < (numbers["held_out_accuracy_high"] - numbers["held_out_accuracy_low"]) * numbers["held_out_pairs"] ** 0.5
        < 2.1
    )
    assert numbers["brier"] < 0.3
    assert numbers["held_out_loss"] == pytest.approx(0.7, abs=0.1)


@pytest.fixture
def pandalm(real_data, tmp_path) -> str:
    recipe = tmp_path / "pandalm.yaml"
    recipe.write_text(PANDALM.format(path=real_data / "pref" / "pandalm_human.json", ties="drop"), encoding="utf-8")
    return str(recipe)


def test_a_reward_model_on_pandalm_is_told_to_be_near_chance(tmp_path, tiny_base, pandalm, capsys):
    halves = split(pandalm, tmp_path / "halves", 0.3)

    numbers = run(tmp_path / "registry", tiny_base, halves, "max_steps=8", "eval_steps=8")

    require_honest(numbers)
    printed = capsys.readouterr().out
    assert f"held out: {numbers['held_out_pairs']:.0f} pairs, accuracy 0." in printed
    assert ("no better than a coin" in printed) == (
        numbers["held_out_accuracy_low"] <= 0.5 <= numbers["held_out_accuracy_high"]
    )


def test_ties_are_left_out_or_kept_in_both_orders_as_the_recipe_says(real_data, pandalm):
    dropped = load_records(pandalm, view="preference", on_bad_row="skip")
    both = Path(pandalm).with_name("both.yaml")
    both.write_text(Path(pandalm).read_text().replace("ties: drop", "ties: both"))

    kept = load_records(str(both), view="preference", on_bad_row="skip")

    assert dropped.dropped["tie"] == 37
    assert len(kept.records) == len(dropped.records) + 2 * dropped.dropped["tie"]


@pytest.mark.slow
def test_a_reward_model_on_hh_is_told_to_be_near_chance(tmp_path, tiny_base, real_data):
    halves = split(str(real_data / "pref" / "hh_harmless_test.jsonl.gz"), tmp_path / "halves", 0.2)

    numbers = run(tmp_path / "registry", tiny_base, halves, "max_steps=12", "eval_steps=12")

    require_honest(numbers)
    data = open_registry(tmp_path / "registry").resolve("judge").manifest["data"]
    assert data[1]["trained_rows"] == numbers["held_out_pairs"]
