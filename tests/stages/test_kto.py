"""Kahneman-Tversky optimisation: from where the start stands, against a frozen copy of it, on unpaired feedback."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from align import dpo, kto, sft
from align.data import load_records
from align.data.rendering.render_view import render_view
from align.registry import Registry, open_registry
from align.training.command import main
from align.training.stage import Stage


def run(stage: Stage, registry: Registry, *words: object) -> int:
    small = [
        "max_steps=8", "per_device_train_batch_size=8", "logging_steps=1", "save_steps=0", "bf16=false", "lora.r=4",
        "learning_rate=5e-3", "warmup_ratio=0",
    ]  # fmt: skip
    return main(stage, ["--registry", str(registry.root), *small, *map(str, words)])


def log_of(registry: Registry, name: str) -> list[dict]:
    path = Path(registry.resolve(name).location) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_base, demonstrations) -> Registry:
    """A registry with an SFT adapter."""
    registry = open_registry(tmp_path_factory.mktemp("kto") / "registry")
    assert run(sft.STAGE, registry, f"model={tiny_base}", f"data={demonstrations}", "name=start") == 0
    return registry


@pytest.mark.parametrize("cached", ["true", "false"])
@pytest.mark.parametrize(
    ("start", "words"),
    [("base", []), ("start", []), ("start", ["quantization=nf4"])],
    ids=["a new adapter", "a continued adapter", "a 4-bit base"],
)
def test_the_first_loss_is_a_half_and_the_kl_is_zero(shared, tiny_base, preferences, capsys, start, words, cached):
    model = tiny_base if start == "base" else start
    settings = [f"model={model}", f"data={preferences}", "name=first", "max_steps=2", f"cache_reference={cached}"]

    assert run(kto.STAGE, shared, *settings, *words) == 0

    first = log_of(shared, "first")[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert "step 1 as expected, policy equals reference" in capsys.readouterr().out


def test_it_learns_which_answers_are_good(shared, preferences, held_out_preferences):
    words = [f"data={preferences}", f"eval_data={held_out_preferences}", "max_steps=40", "eval_steps=20", "beta=0.5"]

    assert run(kto.STAGE, shared, "model=start", "name=learnt", *words) == 0

    manifest = shared.resolve("learnt").manifest
    assert manifest["metrics"]["rewards/margins"] > 0.5
    assert manifest["metrics"]["loss"] < 0.45
    assert manifest["metrics"]["eval_loss"] < 0.45
    assert manifest["parents"][0]["reference"] == "start@v1"


def feedback(folder: Path, good: int, bad: int, times: int = 0) -> Path:
    path = folder / "feedback.jsonl"
    rows = [
        {
            "prompt": f"ask {number}",
            "completion": " ".join([f"egg {number}"] * (1 + number * times)),
            "label": number < good,
        }
        for number in range(good + bad)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_good_and_bad_answers_weigh_the_same_together(shared, tmp_path, capsys):
    assert run(kto.STAGE, shared, "model=start", f"data={feedback(tmp_path, 30, 10)}", "name=rare", "max_steps=2") == 0

    assert "30 good answers of weight 1, 10 bad ones of weight 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("good", "bad", "asked", "weights"),
    [
        (10, 10, {}, (1.0, 1.0)),
        (10, 40, {}, (4.0, 1.0)),
        (40, 10, {}, (1.0, 4.0)),
        (40, 10, {"undesirable_weight": 2.0}, (1.0, 2.0)),
        (40, 10, {"desirable_weight": 0.5, "undesirable_weight": 2.0}, (0.5, 2.0)),
    ],
)
def test_weights_are_those_asked_for_else_balanced(good, bad, asked, weights):
    config = kto.KtoConfig(model="m", data="d", name="n", **asked)

    assert kto.balance_weights(good, bad, config) == weights


def test_the_kl_is_estimated_on_answers_to_other_prompts_of_the_batch():
    rows = Dataset.from_list([{"prompt_ids": [n], "completion_ids": [100 + n], "label": True} for n in range(9)])

    made = kto.add_mismatched(rows, 4, seed=0)

    for start, stop in ((0, 4), (4, 8)):
        some = made.select(range(start, stop))
        own, other = ([ids[0] for ids in some[key]] for key in ("completion_ids", "KL_completion_ids"))
        assert sorted(own) == sorted(other)
        assert all(mine != its for mine, its in zip(own, other, strict=True))
    assert made[8]["KL_completion_ids"] != made[8]["completion_ids"]


def test_the_loss_curve_equals_plain_trl_on_the_same_rows(shared, tiny_base, preferences, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import KTOConfig, KTOTrainer

    words = ["model=start", f"data={preferences}", "name=ours", "fast_path=false", "cache_reference=false"]
    assert run(kto.STAGE, shared, *words) == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    records = load_records(str(preferences), view="unpaired").records
    rows = Dataset.from_list(render_view("unpaired", records, tokenizer, 1024).rows)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    trainer = KTOTrainer(
        model=PeftModel.from_pretrained(base, shared.resolve("start").location, is_trainable=True),
        args=KTOConfig(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=8, learning_rate=5e-3, warmup_steps=0,
            lr_scheduler_type="cosine", seed=0, bf16=False, activation_checkpointing=False, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train_dataset = kto.add_mismatched(rows, 8, 0)
    trainer.remove_callback(PrinterCallback)

    trainer.train()

    plain = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in log_of(shared, "ours")] == plain


def test_the_first_loss_is_the_formula_on_weighted_answers(shared, tmp_path):
    """With every log-ratio 0 each answer's loss is its weight times 1 - sigmoid(0)."""
    data = feedback(tmp_path, 6, 2)
    assert run(kto.STAGE, shared, "model=start", f"data={data}", "name=weighted", "max_steps=2") == 0

    first = log_of(shared, "weighted")[0]
    assert first["loss"] == pytest.approx((6 * 1 + 2 * 3) / 8 * (1 - 1 / (1 + math.exp(0))), abs=1e-5)


def test_dropout_is_not_left_on(shared, preferences, capsys):
    words = ["model=start", f"data={preferences}", "name=dropout", "trainer.disable_dropout=false"]

    assert run(kto.STAGE, shared, *words) == 2

    assert "the KL compares two passes of one model" in capsys.readouterr().err


def test_one_row_in_a_batch_is_refused(shared, preferences, capsys):
    words = ["model=start", f"data={preferences}", "name=one", "per_device_train_batch_size=1"]

    assert run(kto.STAGE, shared, *words) == 2

    assert "per_device_train_batch_size" in capsys.readouterr().err


def test_demonstrations_hold_no_verdict(shared, demonstrations, capsys):
    assert run(kto.STAGE, shared, "model=start", f"data={demonstrations}", "name=none") == 3

    assert "label" in capsys.readouterr().err


def test_real_feedback_trains(shared, real_data, tmp_path):
    recipe = tmp_path / "halueval.yaml"
    recipe.write_text(
        f"source: {real_data}/unpaired/halueval_general.json\nformat: unpaired\nlimit: 60\n"
        "columns: {prompt: user_query, completion: chatgpt_response, label: hallucination}\n"
        "label_map: {yes: false, no: true}\n"
    )

    assert (
        run(
            kto.STAGE,
            shared,
            "model=start",
            f"data={recipe}",
            "name=real",
            "on_long=drop",
            "max_length=384",
            "max_steps=2",
        )
        == 0
    )

    assert shared.resolve("real").manifest["data"][0]["rows"] == 60


def one_sided_seed(good: int, bad: int, size: int, kind: bool) -> int:
    """A seed with which the first batch holds answers of one kind only."""
    rows = Dataset.from_dict({"label": [number < good for number in range(good + bad)]})
    return next(seed for seed in range(100) if set(rows.shuffle(seed=seed)["label"][:size]) == {kind})


@pytest.mark.parametrize("kind", [True, False], ids=["good", "bad"])
def test_a_first_batch_of_one_kind_of_answers_trains_in_bf16(shared, tmp_path, kind):
    good, bad = (12, 4) if kind else (4, 12)
    data = feedback(tmp_path, good, bad, times=8)
    settings = ["per_device_train_batch_size=4", f"seed={one_sided_seed(good, bad, 4, kind)}", "max_steps=1"]

    assert run(kto.STAGE, shared, "model=start", f"data={data}", "name=sided", *settings, "bf16=true") == 0

    first = log_of(shared, "sided")[0]
    assert ("rewards/chosen" in first, "rewards/rejected" in first) == (kind, not kind)


@pytest.mark.parametrize("stage", [kto, dpo], ids=["kto", "dpo"])
@pytest.mark.parametrize(
    "setting",
    [{"bf16": True}, {"quantization": "int8"}, {"trainer": {"fp16": True}}, {"trainer": {"tf32": True}}],
    ids=["bf16", "int8", "fp16", "tf32"],
)
def test_rounding_of_long_and_of_sure_answers_is_no_other_reference(stage, setting):
    """What rounding does to an answer of a thousand nats, and to one that the model is nearly sure of."""
    config = stage.STAGE.config(model="m", data="d", name="n", **{"bf16": False} | setting)
    expected = stage.first_numbers(config, 1.0, 1.0) if stage is kto else stage.first_numbers(config)

    for side in ("chosen", "rejected"):
        for logps, nats, admitted in ((-1000.0, 1.0, True), (-0.05, 0.02, True), (-1000.0, 50.0, False)):
            logged = {f"logps/{side}": logps}
            assert expected[f"rewards/{side}"].is_met_by(config.beta * nats, logged) is admitted
            assert expected["loss"].is_met_by(expected["loss"].value + config.beta * nats, logged) is admitted
            assert "kl" not in expected or expected["kl"].is_met_by(nats, logged) is admitted


def test_single_precision_is_held_to_more_digits():
    config = kto.KtoConfig(model="m", data="d", name="n", bf16=False)

    expected = kto.first_numbers(config, 1.0, 1.0)

    assert not expected["kl"].is_met_by(0.02, {"logps/chosen": -1000.0})
    assert expected["kl"].is_met_by(1e-3, {"logps/chosen": -1000.0})
