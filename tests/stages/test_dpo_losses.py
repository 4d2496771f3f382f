"""Every loss of DPO at its first batch, where policy and reference are equal and the value can be written down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import log, log1p
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align import dpo
from align.config import build
from align.data import load_records
from align.data.rendering.render_view import render_view
from align.errors import UsageError
from align.models.packed import use_fast_path
from align.registry import open_registry
from align.training.command import main

BETA, EPS = 0.2, 0.1

# With every log-ratio 0, sigmoid(0) = 1/2 and -log sigmoid(0) = ln 2.
FIRST = {
    "sigmoid": log(2),
    "sigmoid_norm": log(2),
    "hinge": 1 - BETA * 0,
    "ipo": (0 - 1 / (2 * BETA)) ** 2,
    "robust": ((1 - EPS) * log(2) - EPS * log(2)) / (1 - 2 * EPS),
    "exo_pair": 0.5 * (log(0.5) - log1p(-EPS)) + 0.5 * (log(0.5) - log(EPS)),
    "nca_pair": log(2) + 0.5 * log(2) + 0.5 * log(2),
    "bco_pair": log(2) + log(2),
    "sppo_hard": (0 - 0.5 / BETA) ** 2 + (0 + 0.5 / BETA) ** 2,
    "aot": (1 - 0) * log(2) + 0 * log(2),
    "aot_unpaired": log(2),
    "apo_zero": (1 - 0.5) + 0.5,
    "apo_down": 0.5 + (1 - 0.5),
    "discopop": log(2) * (1 - 0.5) + 1.0 * 0.5,
}
SMOOTHED = ("robust", "exo_pair")

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(root: Path, *words: object) -> int:
    fixed = [f"beta={BETA}", "bf16=false", "lora.r=2", "lora.target_modules=[q_proj]", "learning_rate=1e-3"]
    rest = ["max_steps=1", "warmup_ratio=0", "logging_steps=1", "save_steps=0", "per_device_train_batch_size=4"]
    return main(dpo.STAGE, ["--registry", str(root), *fixed, *rest, *map(str, words)])


def first_of(root: Path, name: str) -> dict[str, float]:
    log_file = Path(open_registry(root).resolve(name).location) / "metrics.jsonl"
    return json.loads(log_file.read_text().splitlines()[0])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("losses")


@pytest.fixture(scope="module")
def start(tiny_base, preferences) -> list[str]:
    return [f"model={tiny_base}", f"data={preferences}"]


def test_every_loss_type_is_in_one_of_the_tables():
    assert {*FIRST, "sft"} == set(dpo.LossType.__args__)


@pytest.fixture(scope="module")
def prepared(root, start) -> tuple[Any, dict]:
    """The trainer of a run that is ready to train, and its first batch."""
    seen = []

    def capture(run, trainer):
        seen.append(trainer)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.training.loop.train", capture)
        assert run(root, *start, "name=prepared") == 0
    return seen[0], next(iter(seen[0].get_train_dataloader()))


@pytest.mark.parametrize("kind", FIRST)
def test_the_first_value_of_a_loss_is_its_closed_form(prepared, kind):
    trainer, batch = prepared
    trainer.loss_types, trainer.label_smoothing = [kind], EPS if kind in SMOOTHED else 0.0

    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(FIRST[kind], rel=1e-5)


@pytest.fixture
def moved(prepared) -> Iterator[Any]:
    """The trainer and its batch, with a policy that has left its reference."""
    updates = [value for key, value in prepared[0].model.named_parameters() if "lora_B.default" in key]
    torch.manual_seed(0)
    for value in updates:
        value.data.normal_(std=3)
    yield prepared
    for value in updates:
        value.data.zero_()


@pytest.mark.parametrize("kind", [*FIRST, "sft"])
def test_a_loss_and_its_gradient_are_the_same_on_the_fast_path(moved, kind, monkeypatch):
    trainer, batch = moved
    trainer.loss_types, trainer.label_smoothing = [kind], EPS if kind in SMOOTHED else 0.0
    path = use_fast_path(trainer.model, pytest.fail)
    found = {}
    for active in (True, False):
        monkeypatch.setattr(path, "active", active)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradient = torch.cat([value.grad.flatten() for value in trainer.model.parameters() if value.grad is not None])
        found[active] = loss.item(), gradient

    (ours, our_gradient), (theirs, their_gradient) = found[True], found[False]
    assert path.proved
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours != pytest.approx(FIRST.get(kind, 0), rel=1e-5)
    assert (our_gradient - their_gradient).norm() < 1e-4 * their_gradient.norm()


def test_a_loss_weighted_by_the_policy_asks_for_more_than_the_fast_path_gives(root, start, capsys):
    words = ["trainer.use_weighting=true", "max_steps=2"]

    assert run(root, *start, *words, "name=weighted") == 0
    assert "fast path: it does not give log_sum_sq_probs" in capsys.readouterr().out
    assert run(root, *start, *words, "name=weighted-stock", "fast_path=false") == 0

    assert first_of(root, "weighted")["loss"] == pytest.approx(first_of(root, "weighted-stock")["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIRST)
def test_a_run_with_a_loss_type_logs_its_closed_form_first(root, start, kind):
    name = kind.replace("_", "-")
    smoothing = EPS if kind in SMOOTHED else 0

    assert run(root, *start, f"name={name}", f"loss_type={kind}", f"label_smoothing={smoothing}") == 0

    assert first_of(root, name)["loss"] == pytest.approx(FIRST[kind], rel=1e-5)


@pytest.mark.parametrize("kind", FIRST)
def test_the_start_up_check_expects_the_closed_form(kind):
    assert dpo.first_loss(kind, BETA, EPS if kind in SMOOTHED else 0) == pytest.approx(FIRST[kind], rel=1e-12)


def test_a_mix_is_the_weighted_sum_and_sft_is_the_mean_over_the_tokens_of_the_chosen(
    root, start, tiny_base, preferences
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = render_view("preference", load_records(str(preferences), view="preference").records, tokenizer, 1024).rows
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    sums, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            answer = logps[len(row["prompt_ids"]) - 1 :].gather(1, ids[0, len(row["prompt_ids"]) :, None])
            sums, tokens = sums - answer.sum().item(), tokens + len(answer)

    words = ["loss_type=[sigmoid,hinge,sft]", "loss_weights=[2.0,0.5,0.1]", "per_device_train_batch_size=64"]
    assert run(root, *start, "name=mix", *words) == 0

    expected = 2.0 * log(2) + 0.5 * 1 + 0.1 * sums / tokens
    assert first_of(root, "mix")["loss"] == pytest.approx(expected, rel=1e-5)


def test_sft_alone_trains_and_its_rewards_start_at_zero(root, start, capsys):
    assert run(root, *start, "name=only-sft", "loss_type=sft") == 0

    assert abs(first_of(root, "only-sft")["rewards/chosen"]) < 1e-5
    assert "policy equals reference: rewards/chosen" in capsys.readouterr().out


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_another_divergence_starts_at_the_same_value(prepared, monkeypatch, divergence):
    trainer, batch = prepared
    trainer.loss_types = ["sigmoid"]
    monkeypatch.setattr(trainer, "f_divergence_type", divergence)

    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"loss_type": "sigmod"}, "loss_type"),
        ({"loss_type": []}, "loss_type"),
        ({"beta": 0}, "beta"),
        ({"beta": -1}, "beta"),
        ({"loss_type": "robust"}, "loss_type=robust: label_smoothing is 0"),
        ({"loss_type": ["sft", "exo_pair"]}, "give label_smoothing=1e-3"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1: sigmoid has none"),
        ({"loss_type": ["sigmoid", "ipo"], "label_smoothing": 0.1}, "sigmoid, ipo has none"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "label_smoothing"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "one weight above 0 for each loss"),
        ({"loss_weights": [0.0]}, "one weight above 0 for each loss"),
        ({"loss_type": "aot", "trainer": {"f_divergence_type": "forward_kl"}}, "not defined for aot"),
        ({"loss_type": "aot", "trainer": {"use_weighting": True}}, "use another loss_type"),
    ],
)
def test_losses_that_cannot_be_meant_are_refused_with_what_to_give(words, message):
    with pytest.raises(UsageError) as error:
        build(dpo.DpoConfig, {"model": "m", "data": "d", "name": "n"} | words)

    assert message in str(error.value)
