"""A reward model over another base, with another tokenizer, beside a policy that knows nothing of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import WORDS
from zoo import build_zoo_model

from align import grpo, ppo
from align.config import LoraSettings
from align.errors import IntegrityError, UsageError
from align.models.adapter_config import adapter_parameters
from align.models.adapters import digests_of_base, save_adapter
from align.models.heads import load_scorer, start_reward
from align.models.loading import Precision
from align.registry import open_registry
from align.rewards import RewardContext
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.schema import Record
from align.training.command import main

FP32 = Precision(bf16=False)
ASKED = [Record(prompt=[{"role": "user", "content": "lazy dog?"}], source="a.jsonl", line=line) for line in (1, 2, 3)]
ANSWERS = ["the quick brown fox", "", "nine <|im_end|> eggs"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry with the reward model `judge` over a GPT-2 whose tokenizer and template are its own."""
    folder = tmp_path_factory.mktemp("learned")
    registry = open_registry(folder / "registry")
    base = build_zoo_model("gpt2", folder / "gpt2")
    loaded = start_reward(registry, registry.resolve(str(base)), LoraSettings(r=2), FP32)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(loaded.model, "default"):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    with registry.stage("judge") as staging:
        save_adapter(loaded.model, "default", staging.path, loaded.base.location)
        loaded.tokenizer.save_pretrained(staging.path)
        digests = digests_of_base(loaded.base)
        facts = {"base": {"reference": str(base), "location": str(base), "digests": digests}, "template_digest": None}
        staging.commit({"stage": "reward", "kind": "reward", "parents": [], "data": [], "metrics": {}} | facts)
    return registry


def opened(registry, said=None, **args):
    rewards = WeightedRewards([RewardSettings(name="learned", weight=0.5, args={"model": "judge"} | args)])
    models = rewards.load(RewardContext(registry, FP32, [].append if said is None else said.append))
    return rewards, models


def test_completions_are_scored_as_text_by_the_reward_models_own_tokenizer_and_template(registry):
    said = []
    rewards, models = opened(registry, said, batch_size=2)

    found = rewards.score_all(ASKED, ANSWERS)

    judge = load_scorer(registry, registry.resolve("judge"), FP32)
    for record, answer, values in zip(ASKED, ANSWERS, found, strict=True):
        stop = judge.tokenizer.eos_token
        asked = judge.tokenizer.apply_chat_template(record.prompt, add_generation_prompt=True, tokenize=False)
        written = judge.tokenizer.encode(answer, add_special_tokens=False, split_special_tokens=True)
        ids = torch.tensor([[*judge.tokenizer.encode(asked), *written, judge.tokenizer.convert_tokens_to_ids(stop)]])
        with torch.no_grad():
            expected = judge.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert values["learned"] == pytest.approx(expected, abs=1e-5)
        assert rewards.total(values) == 0.5 * values["learned"]
    assert [model.reference for model in models] == ["judge@v1"]
    assert "judge@v1: scores completions as text, 2 at a time, with the tokenizer" in said[0]
    assert "is loaded beside the policy's" in said[0]


def test_a_conversation_too_long_for_it_loses_its_oldest_turns_and_an_answer_is_read_as_far_as_it_fits(registry):
    rewards, _ = opened(registry)
    turns = [{"role": role, "content": " ".join(WORDS[:10])} for _ in range(9) for role in ("user", "assistant")]
    long = Record(prompt=[*turns, {"role": "user", "content": "eggs"}], source="a.jsonl", line=9)

    assert "learned" in rewards.score_all([long], ["nine"])[0]
    asked = Record(prompt=long.prompt[-1:])
    assert rewards.score_all([asked], ["eggs " * 200])[0] == rewards.score_all([asked], ["eggs " * 300])[0]
    assert rewards.score_all([asked], ["eggs " * 200])[0] != rewards.score_all([asked], ["eggs " * 20])[0]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"model": "hf://org/judge"}, IntegrityError, "on the hub only; give a folder: hf download org/judge"),
        ({"model": "jugde"}, IntegrityError, "jugde"),
        ({"batch_size": 0}, UsageError, "rewards: learned: batch_size: should be greater than 0, found 0"),
        ({"modle": "judge"}, UsageError, "learned: .*'modle'.* did you mean model"),
    ],
)
def test_what_cannot_be_loaded_is_told(registry, args, error, message):
    with pytest.raises((error, UsageError), match=message):
        opened(registry, **args)


@pytest.fixture(scope="module")
def whole(registry, tmp_path_factory):
    """The same reward model as one folder that needs no adapter."""
    from align.models.merge import merge

    folder = tmp_path_factory.mktemp("whole") / "judge"
    merge(registry, "judge", folder)
    return folder


def test_a_whole_classifier_scores_as_the_adapter_it_was_merged_from(registry, whole):
    adapter, _ = opened(registry)
    merged, models = opened(registry, model=str(whole))

    one, other = adapter.score_all(ASKED, ANSWERS), merged.score_all(ASKED, ANSWERS)

    assert [row["learned"] for row in one] == pytest.approx([row["learned"] for row in other], abs=1e-4)
    assert [model.location for model in models] == [str(whole)]


def test_a_model_without_one_trained_head_is_no_reward_model(registry, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    base = registry.resolve_base(registry.resolve("judge")).location
    with pytest.raises(IntegrityError, match="expected a reward model with one score head, found kind base and 0 head"):
        opened(registry, model=base)
    config = AutoConfig.from_pretrained(base, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    with pytest.raises(IntegrityError, match=r"1 heads of shapes \[\(3, 32\)\]"):
        opened(registry, model=str(tmp_path / "three"))


@pytest.fixture
def words(registry, tiny_base, tmp_path, no_pictures) -> list[str]:
    """A run of one step on the prompts above, from another base than the reward model's."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": record.prompt}) + "\n" for record in ASKED))
    return [
        "--registry", str(registry.root), f"model={tiny_base}", f"data={data}", "bf16=false", "max_steps=1",
        "per_device_train_batch_size=4", "max_length=64", "lora.r=2",
    ]  # fmt: skip


PPO = ["rollout_batch_size=4", "sampling.max_new_tokens=5", "sampling.missing_eos_penalty=0"]


def parents_and_numbers(registry, name):
    made = registry.resolve(name)
    row = json.loads((Path(made.location) / "metrics.jsonl").read_text())
    return [parent["reference"] for parent in made.manifest["parents"]], row


def test_ppo_trains_on_it_and_measures_gold_by_it(registry, words, tiny_base, capsys):
    rewards = "rewards=[{name: learned, weight: 2.0, args: {model: judge}}, {name: length, args: {target: 3}}]"

    assert (
        main(ppo.STAGE, [*words, *PPO, "name=tuned", rewards, "gold=[{name: learned, args: {model: judge@v1}}]"]) == 0
    )

    assert capsys.readouterr().out.count("judge@v1: scores completions as text") == 2
    parents, row = parents_and_numbers(registry, "tuned")
    assert parents == [str(tiny_base), "judge@v1"]
    assert row["gold_mean"] == pytest.approx(row["rewards/learned"])
    assert row["score_mean"] == pytest.approx(2 * row["rewards/learned"] + row["rewards/length"], abs=1e-5)


def test_a_whole_classifier_given_as_the_reward_model_is_read_as_text(registry, words, whole, tiny_base, capsys):
    gold = "gold=[{name: learned, args: {model: judge}}]"

    assert main(ppo.STAGE, [*words, *PPO, "name=by-text", f"reward_model={whole}", gold]) == 0

    assert f"{whole}: scores completions as text, 16 at a time" in capsys.readouterr().out
    parents, row = parents_and_numbers(registry, "by-text")
    assert parents == [str(tiny_base), str(whole)]
    assert row["score_mean"] == pytest.approx(row["rewards/learned"], abs=1e-5)
    assert row["gold_mean"] == pytest.approx(row["rewards/learned"], abs=1e-4)


def test_grpo_trains_on_it(registry, words, tiny_base, capsys):
    more = ["num_generations=2", "max_completion_length=5", "warmup_ratio=0"]
    rewards = "rewards=[{name: learned, weight: 2.0, args: {model: judge}}]"

    assert main(grpo.STAGE, [*words, *more, "name=grouped", rewards]) == 0

    assert "judge@v1: scores completions as text" in capsys.readouterr().out
    parents, row = parents_and_numbers(registry, "grouped")
    assert parents == [str(tiny_base), "judge@v1"]
    assert row["reward"] == pytest.approx(2 * row["rewards/learned/mean"], abs=1e-5)


def test_as_the_policys_own_reward_model_an_adapter_is_refused_with_both_digests(registry, words, capsys):
    assert main(ppo.STAGE, [*words, *PPO, "name=other", "reward_model=judge"]) == 4

    told = capsys.readouterr().err
    assert re.search(r"judge@v1: trained over a base whose \w+ is sha256:\w{64}, but .* has sha256:\w{64}; ", told)
    assert "rewards=[{name: learned, args: {model: judge@v1}}]" in told
