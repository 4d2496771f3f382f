"""Rows that are sound as text and still cannot be trained on as tokens, through the command line of a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align import dpo, sft
from align.registry import open_registry
from align.training.stage import Stage, main

LONG = "nine blue eggs " * 200


def talk(asked: str, answered: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered, **more}]}


def pair(number: int, same: bool) -> dict:
    """A pair whose two answers differ in a character that the tokenizer takes for the same."""
    return {"prompt": f"ask {number}", "chosen": f"egg {number}", "rejected": f"egg {number}" if same else "fox"}


def short(count: int) -> list[dict]:
    return [talk(f"ask {number}", f"egg {number}") for number in range(count)]


CASES = {
    "18 long prompts": (
        sft.STAGE, [*short(6), talk(LONG, "a"), talk(LONG, "b")], [],
        "2 of 8 rows are longer than max_length=64, even without their oldest turns; raise max_length, or leave them "
        "out with on_long=drop, or cut their prompts with on_long=truncate_left",
    ),
    "19 long answers are dropped, never cut": (
        sft.STAGE, [talk("a", LONG), talk("b", LONG)], ["on_long=truncate_left"],
        "2 rows to render: 0 are left (longer than max_length: 2); raise max_length or give other data",
    ),
    "20 the same answer twice": (
        dpo.STAGE, [pair(number, same=True) for number in range(4)], [], "chosen",
    ),
    "21 nothing is trained": (
        sft.STAGE, [talk(f"ask {number}", "egg", train=False) for number in range(4)], [],
        "4 rows to render: 0 are left (no token to train: 4)",
    ),
}  # fmt: skip


def run(stage: Stage, root: Path, base: Path, rows: list[dict], *words: str) -> int:
    data = root.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["max_length=64", "max_steps=2", "per_device_train_batch_size=2", "bf16=false", "lora.r=2", "save_steps=0"]
    return main(stage, ["--registry", str(root), f"model={base}", f"data={data}", "name=bad", *small, *words])


@pytest.mark.parametrize("case", CASES)
def test_rows_that_cannot_be_trained_on_end_with_one_message(tmp_path, tiny_base, capsys, case):
    stage, rows, words, message = CASES[case]

    assert run(stage, tmp_path / "registry", tiny_base, rows, *words) == 3

    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert open_registry(tmp_path / "registry").names() == []


@pytest.mark.parametrize(
    ("policy", "kept", "dropped"), [("drop", 6, {"longer than max_length": 2}), ("truncate_left", 8, {})]
)
def test_18_long_prompts_are_dropped_or_cut_when_asked_and_the_manifest_says_so(
    tmp_path, tiny_base, policy, kept, dropped
):
    rows = [*short(6), talk(LONG, "a"), talk(LONG, "b")]

    assert run(sft.STAGE, tmp_path / "registry", tiny_base, rows, f"on_long={policy}") == 0

    entry = open_registry(tmp_path / "registry").resolve("bad").manifest["data"][0]
    assert (entry["rows"], entry["trained_rows"], entry["dropped"]) == (8, kept, dropped)
