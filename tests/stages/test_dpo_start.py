"""Where DPO starts: its reference is what the policy starts as, and a run that starts elsewhere is ended at once."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from align import dpo, sft
from align.errors import IntegrityError
from align.registry import open_registry
from align.training import reference
from align.training.command import main
from align.training.reference import Expected

FIXED = ["bf16=false", "lora.r=4", "learning_rate=5e-3", "logging_steps=1", "per_device_train_batch_size=4"]

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(stage, root: Path, *words: object) -> int:
    return main(stage, ["--registry", str(root), *FIXED, "max_steps=3", "save_steps=0", *map(str, words)])


def lines_of(root: Path, name: str) -> list[dict]:
    log_file = Path(open_registry(root).resolve(name).location) / "metrics.jsonl"
    return [json.loads(line) for line in log_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_base, demonstrations) -> Path:
    """A registry with the SFT adapter `start`, which has moved far from its base, under dropout."""
    root = tmp_path_factory.mktemp("dpo-start")
    words = [f"model={tiny_base}", f"data={demonstrations}", "name=start", "learning_rate=2e-2", "lora.dropout=0.2"]
    assert run(sft.STAGE, root, *words) == 0
    return root


STARTS = {
    "fresh": [],
    "continued": ["model=start"],
    "accumulated": ["model=start", "gradient_accumulation_steps=2"],
    "uncached": ["model=start", "cache_reference=false"],
    "nf4": ["model=start", "quantization=nf4"],
    "stacked": ["model=start", "adapter=stack"],
    "stacked-nf4": ["model=start", "adapter=stack", "quantization=nf4", "cache_reference=false"],
}


SLOW = {"accumulated", "uncached", "stacked-nf4"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in STARTS]
)
def test_the_first_loss_is_ln_2_and_the_first_rewards_are_0(root, tiny_base, preferences, capsys, name):
    if "nf4" in name:
        pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")

    words = STARTS[name] or [f"model={tiny_base}"]
    shutil.rmtree(open_registry(root).cache_dir / "reference", ignore_errors=True)
    assert run(dpo.STAGE, root, *words, f"data={preferences}", f"name={name}") == 0

    first = lines_of(root, name)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-6)
    assert (first["rewards/chosen"], first["rewards/rejected"]) == pytest.approx((0, 0), abs=1e-5)
    assert "step 1 as expected, policy equals reference: rewards/chosen" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["max_steps=2"], ["--dry-run"]])
def test_lora_settings_that_a_continued_adapter_does_not_take_are_told(root, preferences, capsys, more):
    words = ["model=start", f"data={preferences}", "name=told", "lora.alpha=4", "lora.target_modules=[q_proj]", *more]

    assert run(dpo.STAGE, root, *words) == 0

    told = "start@v1 is an adapter, which is trained further with its own settings"
    assert f"{told}; lora.alpha, lora.target_modules not used" in capsys.readouterr().out  # its r is the one asked for
    assert run(dpo.STAGE, root, *words, "adapter=stack", "--dry-run") == 0
    assert told not in capsys.readouterr().out


@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_reference_that_is_the_bare_base_ends_the_run_with_code_4(root, preferences, monkeypatch, capsys, cached):
    """What happens elsewhere in silence: the trained adapter is switched off instead of copied."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    as_it_is = PeftModel.set_adapter

    def without(self, name, *rest, **options):
        as_it_is(self, name, *rest, **options)
        for module in self.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(name != "ref")

    monkeypatch.setattr(PeftModel, "set_adapter", without)
    monkeypatch.setattr(reference, "reference_key", lambda *_: f"wrong-{cached}")
    words = ["model=start", f"data={preferences}", "name=wrong", f"cache_reference={cached}"]

    assert run(dpo.STAGE, root, *words) == 4

    assert "the reference is not what the policy starts as" in capsys.readouterr().err
    assert "wrong" not in open_registry(root).names()


def test_a_reference_that_was_not_computed_by_this_model_ends_the_run(root, preferences, monkeypatch, capsys):
    score = reference.score_answers
    monkeypatch.setattr(reference, "score_answers", lambda *parts: [value - 0.5 for value in score(*parts)])
    monkeypatch.setattr(reference, "reference_key", lambda *_: "shifted")

    assert run(dpo.STAGE, root, "model=start", f"data={preferences}", "name=shifted") == 4

    assert re.search(r"step 1, found \(expected\): rewards/chosen 0\.0(5|49999)", capsys.readouterr().err)


def test_dropout_that_is_left_on_is_neither_cached_nor_checked(root, preferences, capsys):
    words = ["model=start", f"data={preferences}", "name=dropout", "trainer.disable_dropout=false"]

    assert run(dpo.STAGE, root, *words) == 0

    told = capsys.readouterr().out
    assert "not cached, because trainer.disable_dropout is set" in told
    assert "step 1 as expected" not in told


@pytest.mark.parametrize(
    ("found", "allowed"), [(0.0, True), (9e-6, True), (1.2e-5, False), (-1.2e-5, False), (math.nan, True)]
)
def test_the_tolerance_grows_with_the_log_probability(found, allowed):
    assert Expected(0.0, 1e-5).is_met_by(found, {}) is allowed
    assert Expected(0.0, 0.0, 1e-6, ("logps/chosen",)).is_met_by(found, {"logps/chosen": -10.0}) is allowed


def test_an_adapter_under_another_name_is_no_proof(root, preferences, monkeypatch):
    """The proof before training finds what the first step would find."""
    from align.models.adapters import prove_frozen_copy

    seen = []
    monkeypatch.setattr("align.training.loop.train", lambda run, trainer: seen.append(trainer.model) or {})
    assert run(dpo.STAGE, root, "model=start", f"data={preferences}", "name=seen", "cache_reference=false") == 0
    model = seen[0]
    with torch.no_grad():
        next(value for key, value in model.named_parameters() if "lora_A.ref." in key).add_(1e-3)

    with pytest.raises(IntegrityError, match="1 tensors differ"):
        prove_frozen_copy(model, "default", "ref")


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ({"logps/chosen": -50.0, "rewards/chosen": -1.0}, "chosen answers became less likely, by 10 nats from -40"),
        ({"logps/chosen": -50.0, "rewards/chosen": -0.4}, None),
        ({"logps/chosen": -2.0, "rewards/chosen": -0.09}, None),
        ({"logps/chosen": -50.0, "rewards/chosen": 1.0}, None),
        (
            {"logps/chosen": -50.0, "rewards/chosen": 1.0, "eval_logps/chosen": -50.0, "eval_rewards/chosen": -2.0},
            "held-out chosen answers became less likely, by 20 nats from -30",
        ),
        ({"loss": 0.7}, None),
    ],
)
def test_chosen_answers_that_lose_a_tenth_of_their_log_probability_are_warned_about(numbers, line):
    found = dpo.describe_fall_of_chosen(0.1, numbers)

    assert found is None if line is None else line in found


def test_chosen_answers_that_gain_are_no_warning_and_held_out_accuracy_is_kept(
    root, preferences, held_out_preferences, capsys
):
    words = ["model=start", f"data={preferences}", f"eval_data={held_out_preferences}", "name=gains", "eval_steps=8"]

    assert run(dpo.STAGE, root, *words, "max_steps=8", "loss_type=[sigmoid,sft]", "loss_weights=[1,0.5]") == 0

    metrics = open_registry(root).resolve("gains").manifest["metrics"]
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "logps/chosen", "logps/rejected"} <= metrics.keys()
    assert "became less likely" not in capsys.readouterr().out
