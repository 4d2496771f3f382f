"""The reward stage: its loss by hand, its held-out report, its head on every way it is loaded, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from align import dpo, ppo, reward, sft
from align.config import LoraSettings
from align.models.head_scores import score_sequences
from align.models.heads import load_scorer, start_reward
from align.models.loading import Precision
from align.ppo import PpoConfig
from align.registry import Registry, open_registry
from align.rl.experience import compute_reward_model_scores
from align.rl.ppo_models import load_ppo_models
from align.rl.rollout import Rollout, completion_mask
from align.schema import assistant, user
from align.training.command import main

WEIGHTS = "adapter_model.safetensors"
REPORTED = {
    "held_out_pairs", "held_out_loss", "held_out_accuracy", "held_out_accuracy_low", "held_out_accuracy_high", "ece",
    "brier", "length_correlation", "accuracy_chosen_shorter", "accuracy_chosen_longer", "accuracy_of_longer",
    "score_chosen", "score_rejected",
}  # fmt: skip


def train(root: Path, start: object, data: object, name: str, *words: object, stage=reward.STAGE) -> int:
    fast = ["bf16=false", "lora.r=4", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=8"]
    given = [f"model={start}", f"data={data}", f"name={name}", *fast, "learning_rate=3e-3", "max_steps=24"]
    return main(stage, ["--registry", str(root), *map(str, [*given, *words])])


def first_loss(registry: Registry, reference: str) -> float:
    log = Path(registry.resolve(reference).location) / "metrics.jsonl"
    return json.loads(log.read_text().splitlines()[0])["loss"]


def folder_of(registry: Registry, reference: str) -> Path:
    return Path(registry.resolve(reference).location)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt: str, chosen: str, rejected: str, **more: object) -> dict:
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]} | more


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base, preferences, held_out_preferences, demonstrations) -> Registry:
    """`judge`, a reward model with a held-out report, and `policy`, a policy over the same base."""
    root = tmp_path_factory.mktemp("reward") / "registry"
    assert train(root, tiny_base, preferences, "judge", f"eval_data={held_out_preferences}", "eval_steps=24") == 0
    assert train(root, tiny_base, demonstrations, "policy", "max_steps=2", stage=sft.STAGE) == 0
    return open_registry(root)


def plain_scorer(folder: Path, base: Path):
    """The reward model as another program loads it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, PeftModel.from_pretrained(model, folder).eval()


def plain_score(tokenizer, model, messages) -> float:
    ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"][:, :-1]  # "\n"
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


def test_the_held_out_report_is_what_another_program_finds(trained, tiny_base, held_out_preferences):
    rows = [json.loads(line) for line in held_out_preferences.read_text().splitlines()]
    tokenizer, model = plain_scorer(folder_of(trained, "judge"), tiny_base)
    scores = [
        [plain_score(tokenizer, model, row["prompt"] + row[side]) for row in rows] for side in ("chosen", "rejected")
    ]
    sizes = [[len(tokenizer.encode(row[side][0]["content"])) for row in rows] for side in ("chosen", "rejected")]
    margins = [chosen - rejected for chosen, rejected in zip(*scores, strict=True)]
    shorter = [margin > 0 for margin, a, b in zip(margins, *sizes, strict=True) if a < b]

    numbers = trained.resolve("judge").manifest["metrics"]

    assert numbers.keys() >= REPORTED
    assert numbers["held_out_pairs"] == 32
    assert numbers["held_out_accuracy"] == sum(margin > 0 for margin in margins) / 32
    assert numbers["held_out_accuracy_low"] < numbers["held_out_accuracy"] <= numbers["held_out_accuracy_high"]
    loss = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 32
    assert numbers["held_out_loss"] == pytest.approx(loss, rel=1e-4)
    assert numbers["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert numbers["brier"] == pytest.approx(sum(1 / (1 + math.exp(margin)) ** 2 for margin in margins) / 32, rel=1e-4)
    assert numbers["accuracy_chosen_shorter"] == sum(shorter) / len(shorter)
    assert numbers["length_correlation"] == pytest.approx(
        np.corrcoef(np.ravel(scores), np.ravel(sizes))[0, 1], abs=1e-4
    )
    assert json.loads((folder_of(trained, "judge") / "summary.json").read_text()) == numbers


def test_the_pictures_of_the_report_stand_beside_the_curves(trained, tiny_base, preferences, tmp_path):
    assert train(trained.root, tiny_base, preferences, "unreported", "max_steps=2") == 0

    with (
        Image.open(folder_of(trained, "judge") / "curves.png") as more,
        Image.open(folder_of(trained, "unreported") / "curves.png") as less,
    ):
        assert more.height > less.height
    assert not REPORTED & trained.resolve("unreported").manifest["metrics"].keys()


SEQUENCES = [[1, 30, 40, 50, 2, 21, 2], [60, 31, 32, 33, 34, 35, 36, 37], [7, 8, 2]]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_saved_reward_model_gives_equal_scores_wherever_it_is_loaded(trained, tiny_base, quantization):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    judge, precision = trained.resolve("judge"), Precision(quantization, bf16=False)
    expected = score_sequences(load_scorer(trained, judge, precision), SEQUENCES, 2)

    continued = start_reward(trained, judge, LoraSettings(), precision)
    config = PpoConfig(model="policy", data="x", name="x", bf16=False, quantization=quantization, reward_model="judge")
    models = load_ppo_models(trained, trained.resolve("policy"), judge, config)

    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(score_sequences(continued, SEQUENCES, 3), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ppo_scores(models), expected, rtol=1e-5, atol=1e-6)
    if quantization == "none":
        _, model = plain_scorer(folder_of(trained, "judge"), tiny_base)
        with torch.no_grad():
            plain = [model(input_ids=torch.tensor([ids])).logits.item() for ids in SEQUENCES]
        np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)


def ppo_scores(models) -> np.ndarray:
    """The scores inside PPO, of the sequences cut into a prompt of two tokens and a completion."""
    prompts = torch.tensor([ids[:2] for ids in SEQUENCES])
    width = max(map(len, SEQUENCES)) - 2
    completions = torch.tensor([ids[2:] + [0] * (width - len(ids) + 2) for ids in SEQUENCES])
    mask = (torch.arange(width) < torch.tensor([[len(ids) - 2] for ids in SEQUENCES])).long()
    rollout = Rollout(prompts, torch.ones_like(prompts), completions, mask, *completion_mask(completions, [2])[1:])
    return compute_reward_model_scores(models, rollout, [torch.arange(3)]).numpy()


def test_the_head_is_kept_and_computed_in_full_precision_over_a_base_in_bf16(tiny_base, registry):
    loaded = start_reward(registry, registry.resolve(str(tiny_base)), LoraSettings(r=2), Precision(bf16=True))

    head = {key: value.dtype for key, value in loaded.model.named_parameters() if key.endswith("score.weight")}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = loaded.model(input_ids=torch.tensor([[3, 4, 5]])).logits

    trainable = [key for key, value in loaded.model.named_parameters() if "score" in key and value.requires_grad]
    assert len(trainable) == 1
    assert set(head.values()) <= {torch.float32}
    assert scores.dtype == torch.float32
    assert float(scores) != float(scores.bfloat16())


def test_a_new_head_starts_near_ln_2_and_says_so(trained, tiny_base, preferences, capsys):
    assert train(trained.root, "policy", preferences, "onpolicy", "max_steps=1", "warmup_ratio=0") == 0

    assert "score head: new (the adapter is continued from policy@v1)" in capsys.readouterr().out
    assert first_loss(trained, "onpolicy") == pytest.approx(math.log(2), abs=0.05)


def test_a_reward_model_goes_on_from_another_with_its_head(trained, preferences, capsys):
    assert train(trained.root, "judge", preferences, "further", "max_steps=1", "warmup_ratio=0") == 0

    printed = capsys.readouterr().out
    assert "score head: continued from judge@v1" in printed
    assert "align ppo --model POLICY --reward_model further" in printed
    assert first_loss(trained, "further") < 0.4
    assert trained.resolve("further").manifest["parents"][0]["reference"] == "judge@v1"


def test_its_plan_counts_the_score_head(trained, tiny_base, preferences, capsys):
    words = ["lora.r=1", "lora.target_modules=[q_proj]", "--dry-run"]

    assert train(trained.root, tiny_base, preferences, "plan", *words) == 0

    # Two layers of 32 to 32, A and B, and a weight for each of 32 hidden values.
    assert f"trainable  {2 * (32 + 32) + 32} of " in capsys.readouterr().out


PAIRS = [
    ("fox", "blue eggs over there", "and away", 0.5),
    ("dog", "the blue eggs", "lazy dog with the fox", -0.25),
    ("to", "quick", "brown fox", 2.0),
]


@pytest.mark.parametrize(("with_margin", "coefficient"), [(False, None), (True, None), (True, 0.3)])
def test_the_first_loss_is_the_formula(trained, tmp_path, with_margin, coefficient):
    """Mean of -log sigmoid(c - r - m) plus the coefficient times the mean of (c + r)^2."""
    rows = [
        pair(prompt, chosen, rejected) | ({"margin": m} if with_margin else {}) for prompt, chosen, rejected, m in PAIRS
    ]
    words = [] if coefficient is None else [f"center_rewards_coefficient={coefficient}"]
    name = f"formula-{with_margin}-{coefficient}".lower()

    assert (
        train(
            trained.root, "judge", write(tmp_path / "pairs.jsonl", rows), name, "max_steps=1", "warmup_ratio=0", *words
        )
        == 0
    )

    loaded = load_scorer(trained, trained.resolve("judge"), Precision(bf16=False))
    expected = 0.0
    for prompt, chosen, rejected, margin in PAIRS:
        c, r = (
            plain_score(loaded.tokenizer, loaded.model, [user(prompt), assistant(text)]) for text in (chosen, rejected)
        )
        expected += math.log(1 + math.exp(-(c - r - (margin if with_margin else 0)))) / 3
        expected += (coefficient or 0) * (c + r) ** 2 / 3
    assert first_loss(trained, name) == pytest.approx(expected, rel=1e-5)


def test_pairs_of_equal_answers_are_refused_as_rows(tmp_path, tiny_base, capsys):
    data = write(tmp_path / "same.jsonl", [pair("fox", "dog", "dog"), pair("a", "b", " b ")])

    assert train(tmp_path / "registry", tiny_base, data, "same") == 3

    assert "chosen equals rejected: 2" in capsys.readouterr().err
    assert open_registry(tmp_path / "registry").names() == []


def test_margins_that_leave_nothing_to_learn_end_with_code_5(tmp_path, tiny_base, capsys):
    """At a margin of -1e4 every pair is right beyond doubt: loss and gradient are exactly zero."""
    data = write(tmp_path / "easy.jsonl", [pair(f"fox {n}", f"dog {n}", "the", margin=-1e4) for n in range(24)])

    assert train(tmp_path / "registry", tiny_base, data, "easy") == 5

    assert "the gradient was exactly 0 for 10 steps in a row" in capsys.readouterr().err
    assert open_registry(tmp_path / "registry").names() == []


@pytest.mark.parametrize("stage", [sft.STAGE, dpo.STAGE, ppo.STAGE], ids=["sft", "dpo", "ppo"])
def test_a_reward_model_is_no_policy(trained, preferences, capsys, stage, monkeypatch):
    monkeypatch.setattr("align.models.adapters.load_base", None)
    words = ["reward_model=judge", "rollout_batch_size=8"] if stage is ppo.STAGE else []

    assert train(trained.root, "judge", preferences, "z", *words, stage=stage) == 2

    assert "judge@v1: a reward model scores text and cannot write any" in capsys.readouterr().err


def test_a_policy_scores_nothing_and_a_reward_model_without_its_head_starts_nothing(
    trained, preferences, tmp_path, capsys
):
    assert reward.main(["score", "policy", str(preferences), "--registry", str(trained.root)]) == 4
    assert "policy@v1: expected a reward model with one score head, found kind policy" in capsys.readouterr().err

    folder = tmp_path / "headless"
    shutil.copytree(folder_of(trained, "judge"), folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (folder / "manifest.json").unlink()
    state = {key: value for key, value in load_file(folder / WEIGHTS).items() if "score" not in key}
    save_file(state, folder / WEIGHTS)
    assert train(trained.root, folder, preferences, "z") == 4
    assert "found kind reward and 0 heads" in capsys.readouterr().err


def test_weights_taken_from_an_earlier_step_are_those_that_are_reported(
    tmp_path, tiny_base, preferences, held_out_preferences
):
    """At this rate the loss rises again: the best adapter comes back with the head of its step."""
    words = ["learning_rate=0.1", "early_stopping_patience=1", "eval_steps=3", f"eval_data={held_out_preferences}"]

    assert train(tmp_path, tiny_base, preferences, "best", *words) == 0

    registry = open_registry(tmp_path)
    numbers = registry.resolve("best").manifest["metrics"]
    log = (folder_of(registry, "best") / "metrics.jsonl").read_text().splitlines()
    losses = [row["eval_loss"] for row in map(json.loads, log) if "eval_loss" in row]
    assert losses[-1] > min(losses)
    assert numbers["held_out_loss"] == pytest.approx(min(losses), rel=1e-4)
