"""What DPO is given by mistake: refused with a code and a line that says what to do, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align import dpo, reward, sft
from align.registry import open_registry
from align.training.command import main

GOOD = {"prompt": "say something", "chosen": "blue eggs", "rejected": "red eggs"}
SAME = {"prompt": "say something", "chosen": "blue eggs", "rejected": "blue eggs"}


def run(stage, root: Path, *words: object) -> int:
    fixed = ["bf16=false", "lora.r=2", "max_steps=2", "save_steps=0", "per_device_train_batch_size=2"]
    return main(stage, ["--registry", str(root), *fixed, *map(str, words)])


def rows(*some: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in some)


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_base, demonstrations, preferences) -> Path:
    """A registry with a policy `start`, a reward model `judge` and `astray`, a policy whose base was changed."""
    root = tmp_path_factory.mktemp("dpo-bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.training.register.draw_curves", lambda *_, **__: None)
        assert run(sft.STAGE, root, f"model={tiny_base}", f"data={demonstrations}", "name=start") == 0
        assert run(reward.STAGE, root, "model=start", f"data={preferences}", "name=judge") == 0
    return root


BAD = {
    "every pair is the same twice": (rows(SAME, SAME, SAME), [], 3, "chosen: equals rejected"),
    "a pair is the same twice": (rows(GOOD, SAME), [], 3, "chosen: equals rejected"),
    "an answer is empty": (rows(GOOD, GOOD | {"chosen": ""}), [], 3, "chosen"),
    "both answers are empty": (rows(GOOD | {"chosen": "", "rejected": ""}), [], 3, "chosen"),
    "an answer is null": (rows(GOOD, GOOD | {"rejected": None}), [], 3, "rejected"),
    "prompts are too long": (rows(GOOD, GOOD | {"prompt": "eggs " * 400}), ["max_length=64"], 3, "max_length=64"),
    "no pairs at all": (rows({"prompt": "say", "completion": "eggs"}), [], 3, "chosen"),
    "beta is 0": (rows(GOOD), ["beta=0"], 2, "beta"),
    "beta is negative": (rows(GOOD), ["beta=-0.1"], 2, "beta"),
    "beta is infinite": (rows(GOOD), ["beta=inf"], 2, "beta"),
    "every weight": (rows(GOOD), ["lora=none"], 2, "lora"),
    "a reward model": (rows(GOOD), ["model=judge"], 2, "a reward model scores text and cannot write any"),
    "stacking on a reward model": (rows(GOOD), ["model=judge", "adapter=stack"], 2, "a reward model scores text"),
    "a reference of TRL's own": (rows(GOOD), ["trainer.precompute_ref_log_probs=true"], 2, "set by align itself"),
    "a truncation of TRL's own": (rows(GOOD), ["trainer.truncation_mode=keep_end"], 2, "set by align itself"),
    "sharding": (rows(GOOD), ["trainer.deepspeed=x.json"], 2, "set by align itself"),
    "what TRL refuses": (rows(GOOD), ["trainer.router_aux_loss_coef=0.1"], 2, "not a Mixture-of-Experts model"),
    "a third way": (rows(GOOD), ["adapter=both"], 2, "adapter"),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_before_training_with_its_code(root, tmp_path, capsys, monkeypatch, case):
    text, words, code, message = BAD[case]
    data = tmp_path / "pairs.jsonl"
    data.write_text(text)
    monkeypatch.setattr("align.training.loop.train", lambda *_: pytest.fail("it went on to train"))

    assert run(dpo.STAGE, root, "model=start", f"data={data}", "name=bad", *words) == code

    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "bad" not in open_registry(root).names()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (SAME, ["on_bad_row=skip"]),
        (GOOD | {"chosen": ""}, ["on_bad_row=skip"]),
        (GOOD | {"prompt": "eggs " * 400}, ["max_length=64", "on_long=drop"]),
    ],
    ids=["same", "empty", "long"],
)
def test_with_leave_it_is_left_out_and_counted(root, tmp_path, capsys, monkeypatch, bad, words):
    data = tmp_path / "pairs.jsonl"
    data.write_text(rows(GOOD, GOOD | {"prompt": "say more"}, bad))
    counted = []
    monkeypatch.setattr(
        "align.training.loop.train",
        lambda run, trainer: counted.append((len(trainer.train_dataset), run.data.entries)) or {},
    )
    monkeypatch.setattr("align.training.register.draw_curves", lambda *_, **__: None)

    assert run(dpo.STAGE, root, "model=start", f"data={data}", "name=good", *words) == 0

    kept, entries = counted[0]
    assert kept == 2
    assert sum(entries[0]["dropped"].values()) == 1


@pytest.mark.parametrize("adapter", ["continue", "stack"])
def test_an_adapter_whose_base_was_changed_ends_with_code_4(tmp_path, demonstrations, preferences, capsys, adapter):
    from tiny import build_tiny_qwen3

    base = build_tiny_qwen3(tmp_path / "base")
    assert run(sft.STAGE, tmp_path / "r", f"model={base}", f"data={demonstrations}", "name=astray") == 0
    build_tiny_qwen3(base, seed=7)

    words = ["model=astray", f"data={preferences}", "name=no", f"adapter={adapter}"]
    assert run(dpo.STAGE, tmp_path / "r", *words) == 4

    assert "weights" in capsys.readouterr().err
