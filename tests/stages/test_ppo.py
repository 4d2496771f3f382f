"""PPO from the command line to the registered adapter, on tiny models built from config."""

from __future__ import annotations

import gc
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.config import LoraSettings, build
from align.errors import DataError, DivergedError, IntegrityError, PreemptedError, UsageError
from align.models.adapter_config import adapter_parameters
from align.models.adapters import digests_of_base, save_adapter, start_policy
from align.models.heads import start_reward
from align.models.loading import Precision
from align.ppo import STAGE, PpoConfig, ppo
from align.rewards import reward
from align.rl.ppo_models import POLICY, REFERENCE, REWARD, VALUE
from align.training.command import main, run_stage
from align.training.run import open_run

FP32 = Precision(bf16=False)
KEYS = {
    "loss", "policy_loss", "value_loss", "score_mean", "score_std", "kl", "entropy", "policy_clip_fraction",
    "value_clip_fraction", "explained_variance", "completion_length", "share_without_eos", "tokens_per_second",
    "learning_rate", "kl_coef",
}  # fmt: skip


def shake(model, name="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def register(registry, loaded, name, kind, template=None):
    with registry.stage(name) as staging:
        save_adapter(loaded.model, "default", staging.path, loaded.base.location)
        loaded.tokenizer.save_pretrained(staging.path)
        base = {
            "reference": loaded.base.reference,
            "location": loaded.base.location,
            "digests": digests_of_base(loaded.base),
        }
        facts = {"parents": [], "template_digest": template, "data": [], "metrics": {}, "versions": {}}
        return staging.commit({"stage": "sft", "kind": kind, "base": base} | facts)


@pytest.fixture
def sft(registry, tiny_base):
    loaded = start_policy(registry, registry.resolve(str(tiny_base)), LoraSettings(r=4, alpha=8), FP32)
    shake(loaded.model)
    return register(registry, loaded, "sft", "policy")


@pytest.fixture
def reward_model(registry, tiny_base):
    """Of another rank and other targets than the policy."""
    lora = LoraSettings(r=2, alpha=4, target_modules=["q_proj", "v_proj"])
    loaded = start_reward(registry, registry.resolve(str(tiny_base)), lora, FP32)
    shake(loaded.model, seed=1)
    return register(registry, loaded, "judge", "reward")


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"what is {n} and {n}", "answer": str(n + n)} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(sums):
    """Settings of a small run; a test changes what it is about."""
    return {
        "data": str(sums), "name": "tuned", "bf16": False, "max_length": 96, "learning_rate": 1e-2, "max_steps": 2,
        "rollout_batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2, "sampling": {"max_new_tokens": 6}, "lora": {"r": 4},
        "rewards": [{"name": "length", "args": {"target": 8, "unit": "characters"}}],
    }  # fmt: skip


def logged(registry, name="tuned"):
    (folder,) = registry.runs_dir(name).iterdir()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(registry, settings):
    """What the stage hands back, with all four adapters still in place."""
    config = build(PpoConfig, settings)
    with open_run(STAGE, config, registry, resume=False) as run:
        return ppo(config, run)


def test_the_command_line_registers_a_policy_with_its_lineage(registry, sft, sums, capsys):
    words = [
        "--model", "sft", "--data", str(sums), "--name", "tuned", "--registry", str(registry.root), "max_steps=2",
        "rollout_batch_size=8", "per_device_train_batch_size=4", "sampling.max_new_tokens=5", "bf16=false",
        "rewards=[{name: numeric_match, weight: 2.0}]",
    ]  # fmt: skip

    assert main(STAGE, words) == 0

    checkpoint = registry.resolve("tuned")
    assert (checkpoint.kind, checkpoint.reference) == ("policy", "tuned@v1")
    assert [parent["reference"] for parent in checkpoint.manifest["parents"]] == ["sft@v1"]
    assert "registered tuned@v1" in capsys.readouterr().out
    rows = logged(registry)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row.keys() >= KEYS | {"rewards/numeric_match"} for row in rows)


def test_every_step_keeps_a_sample_completion(registry, sft, settings):
    run_stage(STAGE, build(PpoConfig, settings | {"model": "sft"}), registry)

    (folder,) = registry.runs_dir("tuned").iterdir()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1, 2]
    assert all(row["prompt"].startswith("what is") and isinstance(row["completion"], str) for row in samples)
    assert all(row.keys() == {"step", "prompt", "completion", "score", "rewards", "stopped"} for row in samples)


@pytest.mark.parametrize(
    ("start", "learned", "checkpointing"),
    [("adapter", True, False), ("adapter", False, True), ("base", True, True), ("base", False, False)],
)
def test_kl_is_exactly_zero_and_ratio_exactly_one_before_the_first_update(
    registry, sft, reward_model, tiny_base, settings, start, learned, checkpointing
):
    settings |= {
        "model": "sft" if start == "adapter" else str(tiny_base),
        "reward_model": "judge" if learned else None,
        "lora": {"r": 4, "dropout": 0.2},
        "gradient_checkpointing": checkpointing,
        "shaping": {"kl_estimator": "k3" if learned else "k1"},
    }

    run_stage(STAGE, build(PpoConfig, settings), registry)

    first, second = logged(registry)
    assert first["kl"] == 0.0
    assert first["first_ratio_error"] == 0.0
    assert first["ratio_error"] > 0.0
    assert second["kl"] != 0.0
    # Sampling said it from here on, in other shapes.
    assert second["first_ratio_error"] < 1e-5


@pytest.mark.parametrize(
    "way", ["head", "head-checkpointing", "padded", "full-logits", "groups", "tempered", "bf16", "nf4"]
)
def test_so_they_are_in_every_way_to_compute_them(registry, sft, tiny_base, settings, monkeypatch, way):
    settings |= {"model": "sft"} | {
        "head": {"value": "head"},
        "head-checkpointing": {"value": "head", "gradient_checkpointing": True},
        "padded": {},
        "full-logits": {"value": "head"},
        "groups": {"sampling": {"max_new_tokens": 6, "num_generations": 4, "batch_size": 3}},
        "tempered": {"sampling": {"max_new_tokens": 6, "temperature": 0.7, "top_p": 0.8}},
        "bf16": {"bf16": True, "value": "head"},
        "nf4": {"quantization": "nf4", "bf16": True},
    }[way]
    if way == "nf4":
        pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    if way == "padded":
        monkeypatch.setattr("align.rl.ppo_models.accepts_packed_rows", lambda *_: False)
    if way == "full-logits":
        monkeypatch.setattr("align.rl.ppo_models.plain_head", lambda _: None)

    run_stage(STAGE, build(PpoConfig, settings), registry)

    first, second = logged(registry)
    assert (first["kl"], first["first_ratio_error"]) == (0.0, 0.0)
    assert first["grad_norm"] > 0
    assert first["value_grad_norm"] > 0
    # In single precision sampling says what the training pass says; in less its word is not taken.
    assert second["first_ratio_error"] == 0.0 if way in ("bf16", "nf4") else second["first_ratio_error"] < 1e-5


def test_packed_padded_and_full_logits_train_alike(registry, sft, settings, monkeypatch):
    settings |= {"model": "sft", "learning_rate": 1e-3}
    run_stage(STAGE, build(PpoConfig, settings | {"name": "packed"}), registry)
    monkeypatch.setattr("align.rl.ppo_models.accepts_packed_rows", lambda *_: False)
    run_stage(STAGE, build(PpoConfig, settings | {"name": "padded"}), registry)
    monkeypatch.setattr("align.rl.ppo_models.plain_head", lambda _: None)
    run_stage(STAGE, build(PpoConfig, settings | {"name": "full"}), registry)

    packed, padded, full = (logged(registry, name) for name in ("packed", "padded", "full"))
    for other in (padded, full):
        for ours, theirs in zip(packed, other, strict=True):
            for key in ours.keys() - {key for key in ours if "per_second" in key}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_the_estimator_of_the_kl_that_is_logged_changes_nothing_that_is_learned(registry, sft, settings):
    settings |= {"model": "sft", "kl_coef": 1.0}
    k1, k3 = (
        saved(
            run_stage(STAGE, build(PpoConfig, settings | {"name": name, "shaping": {"kl_estimator": name}}), registry)
        )
        for name in ("k1", "k3")
    )

    assert all((k3[key] == value).all() for key, value in k1.items())
    assert logged(registry, "k1")[-1]["kl"] != logged(registry, "k3")[-1]["kl"]


def test_the_policy_is_not_read_again_once_sampling_is_known_to_say_the_same(registry, sft, settings, monkeypatch):
    from align.rl import experience as scoring

    read, plain = [], scoring.compute_policy
    monkeypatch.setattr(
        scoring,
        "compute_policy",
        lambda models, *rest: read.append(models.model.active_adapter) or plain(models, *rest),
    )

    run_stage(STAGE, build(PpoConfig, settings | {"model": "sft", "max_steps": 3}), registry)

    # Two rows are read to prove the packing; of a rollout, four batches, by the policy in the first step alone.
    assert read == [POLICY] * 2 + [POLICY] * 4 + [REFERENCE] * 4 * 3


def saved(checkpoint):
    return load_file(f"{checkpoint.location}/adapter_model.safetensors")


def held(model, adapter):
    """One adapter's tensors under the names of its file."""
    parameters = {key: value for key, value in model.named_parameters() if f".{adapter}." in key}
    return {key.replace(f".{adapter}.", "."): value.detach() for key, value in parameters.items()}


def test_policy_and_value_move_and_base_reference_and_reward_model_stay(
    registry, tiny_base, sft, reward_model, settings
):
    model = trained(registry, settings | {"model": "sft", "reward_model": "judge"}).model

    start, judge = saved(sft), {key: value for key, value in saved(reward_model).items() if "score" not in key}
    assert held(model, REFERENCE).keys() == start.keys()
    assert all(torch.equal(value, start[key]) for key, value in held(model, REFERENCE).items())
    assert held(model, REWARD).keys() == judge.keys()
    assert all(torch.equal(value, judge[key]) for key, value in held(model, REWARD).items())
    assert not any(torch.equal(value, start[key]) for key, value in held(model, POLICY).items())
    assert held(model, VALUE).keys() == judge.keys()
    assert not any(torch.equal(value, judge[key]) for key, value in held(model, VALUE).items())
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    base = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(base[key], value) for key, value in plain.items())


def live_embeddings():
    return sum(
        issubclass(type(thing), torch.nn.Parameter) and tuple(thing.shape) == (320, 32) for thing in gc.get_objects()
    )


def test_a_second_copy_of_the_base_is_never_loaded(registry, tiny_base, sft, reward_model, settings):
    gc.collect()
    before, seen = live_embeddings(), []

    @reward
    def counts_bases_in_this_test(record, completion):
        seen.append(live_embeddings() - before)
        return 0.0

    settings |= {"model": "sft", "reward_model": "judge", "rewards": [{"name": "counts_bases_in_this_test"}]}
    model = trained(registry, settings).model

    assert set(seen) == {1}
    base = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny_base).parameters())
    policy = sum(value.numel() for value in saved(sft).values())
    judge = sum(value.numel() for key, value in saved(reward_model).items() if "score" not in key)
    assert sum(parameter.numel() for parameter in model.parameters()) == base + 2 * policy + 2 * judge


def stop_at(count):
    """A reward that asks the process to stop while a certain completion is scored."""
    calls = []

    @reward
    def stops_in_this_test(record, completion):
        calls.append(completion)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return float(len(completion))


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(registry, sft, reward_model, settings):
    settings |= {
        "model": "sft", "reward_model": "judge", "rewards": [{"name": "stops_in_this_test"}], "max_steps": 4,
        "adaptive_kl": {"target": 1.0, "horizon": 100},
        "shaping": {"normalize_score": True, "clip_score": 2.0, "whiten": ["scores", "rewards", "advantages"]},
        "sampling": {"max_new_tokens": 6, "num_generations": 2},
    }  # fmt: skip
    stop_at(0)
    whole = run_stage(STAGE, build(PpoConfig, settings | {"name": "whole"}), registry)
    stop_at(2 * 8)
    config = build(PpoConfig, settings | {"name": "parts"})
    with pytest.raises(PreemptedError, match="stopped after step 2 of 4"):
        run_stage(STAGE, config, registry)
    torch.manual_seed(999)
    parts = run_stage(STAGE, config, registry, resume=True)

    one, two = saved(whole), saved(parts)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    timeless = [
        [{key: value for key, value in row.items() if "per_second" not in key} for row in logged(registry, name)]
        for name in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_an_allowed_change_of_learning_rate_takes_effect(registry, sft, settings):
    settings |= {"model": "sft", "rewards": [{"name": "stops_in_this_test"}], "max_steps": 4}
    settings |= {"lr_scheduler_type": "constant"}
    stop_at(2 * 8)
    with pytest.raises(PreemptedError):
        run_stage(STAGE, build(PpoConfig, settings), registry)

    lower = build(PpoConfig, settings | {"learning_rate": 1e-3})
    run_stage(STAGE, lower, registry, resume=True, allow_change=("learning_rate",))

    assert [row["learning_rate"] for row in logged(registry)] == [1e-2, 1e-2, 1e-3, 1e-3]


def test_checkpoints_are_made_at_the_end_of_a_rollout_every_save_steps(registry, sft, settings):
    run_stage(STAGE, build(PpoConfig, settings | {"model": "sft", "max_steps": 3, "save_steps": 1}), registry)

    (folder,) = registry.runs_dir("tuned").iterdir()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_target_kl_ends_the_updates_of_a_step(registry, sft, settings):
    run_stage(STAGE, build(PpoConfig, settings | {"model": "sft", "target_kl": 1e-9}), registry)

    # The first minibatch has KL 0; the second is past the bound and is not stepped on.
    assert logged(registry)[0]["optimizer_steps"] == 1


def test_adaptive_kl_lowers_the_coefficient_while_kl_is_under_its_target(registry, sft, settings):
    settings |= {"model": "sft", "adaptive_kl": {"target": 100.0, "horizon": 80}, "kl_coef": 0.5}

    run_stage(STAGE, build(PpoConfig, settings), registry)

    # Eight completions of a horizon of 80 and an error clipped to -0.2: 2% less after a step.
    assert [row["kl_coef"] for row in logged(registry)] == [0.5, pytest.approx(0.49)]


def test_completions_cut_before_they_stop_lose_the_penalty(registry, sft, settings):
    settings |= {"model": "sft", "max_steps": 1, "sampling": {"max_new_tokens": 1, "missing_eos_penalty": 3.0}}

    run_stage(STAGE, build(PpoConfig, settings), registry)

    (row,) = logged(registry)
    assert row["share_without_eos"] > 0
    assert row["score_mean"] == pytest.approx(row["rewards/length"] - 3.0 * row["share_without_eos"], abs=1e-6)


@pytest.mark.parametrize("whiten", [[], ["rewards"], ["rewards", "advantages"]])
def test_whitening_can_be_chosen(registry, sft, settings, whiten):
    run_stage(STAGE, build(PpoConfig, settings | {"model": "sft", "shaping": {"whiten": whiten}}), registry)

    assert len(logged(registry)) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_registers_nothing(registry, sft, settings):
    @reward
    def explodes_in_this_test(record, completion):
        return 1e30

    settings |= {"model": "sft", "rewards": [{"name": "explodes_in_this_test"}]}

    with pytest.raises(DivergedError, match="lower learning_rate"):
        run_stage(STAGE, build(PpoConfig, settings), registry)

    assert "tuned" not in registry.names()


def test_a_reward_model_over_another_base_is_refused(registry, tmp_path, sft, settings):
    from tiny import build_tiny_qwen3

    other = build_tiny_qwen3(tmp_path / "other", seed=5)
    loaded = start_reward(registry, registry.resolve(str(other)), LoraSettings(r=2), FP32)
    shake(loaded.model)
    register(registry, loaded, "foreign", "reward")

    with pytest.raises(IntegrityError, match="trained over a base whose weights is"):
        run_stage(STAGE, build(PpoConfig, settings | {"model": "sft", "reward_model": "foreign"}), registry)


def test_a_reward_model_of_another_chat_template_is_refused(registry, tiny_base, sft, settings):
    loaded = start_reward(registry, registry.resolve(str(tiny_base)), LoraSettings(r=2), FP32)
    shake(loaded.model)
    register(registry, loaded, "stranger", "reward", template="sha256:0")

    with pytest.raises(IntegrityError, match="trained with the chat template sha256:0"):
        run_stage(STAGE, build(PpoConfig, settings | {"model": "sft", "reward_model": "stranger"}), registry)


def test_a_resumed_run_keeps_one_sample_a_step(registry, sft, settings):
    """Stopped hard after step 3, with the newest checkpoint at step 2."""

    @reward
    def breaks_in_this_test(record, completion):
        calls.append(completion)
        if len(calls) == 3 * 8 + 1:
            raise KeyboardInterrupt
        return 0.0

    calls = []
    settings |= {"model": "sft", "rewards": [{"name": "breaks_in_this_test"}], "max_steps": 4, "save_steps": 2}
    config = build(PpoConfig, settings)
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, config, registry)

    run_stage(STAGE, config, registry, resume=True)

    (folder,) = registry.runs_dir("tuned").iterdir()
    steps = [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_policy_given_as_reward_model_is_refused(registry, sft, settings):
    with pytest.raises(IntegrityError, match="expected a reward model"):
        run_stage(STAGE, build(PpoConfig, settings | {"model": "sft", "reward_model": "sft"}), registry)


def test_a_prompt_without_the_answer_a_reward_needs_is_named(registry, sft, settings, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "hello"}]}) + "\n")
    settings |= {"model": "sft", "data": str(data), "rewards": [{"name": "numeric_match"}]}

    with pytest.raises(DataError, match=r"needs the field answer; .*prompts\.jsonl:1 has none"):
        run_stage(STAGE, build(PpoConfig, settings), registry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": []}, "nothing to optimise"),
        ({"rewards": [{"name": "numeric_macth"}]}, "did you mean numeric_match"),
        ({"rewards": [{"name": "length", "args": {}}]}, "missing a required argument: 'target'"),
        ({"rewards": [{"name": "keyword", "args": {"words": 5}}]}, "keyword: words: should be a valid list, found 5"),
        ({"rollout_batch_size": 6}, "6 is no multiple of the minibatch"),
        ({"sampling": {"max_new_tokens": 96}}, "leaves no room for a prompt"),
        ({"eval_data": "x"}, "eval_data: unknown setting"),
        ({"kl_coeff": 0.1}, "kl_coeff: unknown setting; did you mean kl_coef"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_read(settings, change, message):
    with pytest.raises(UsageError, match=message):
        build(PpoConfig, settings | {"model": "sft"} | change)


def test_there_are_at_most_forty_settings():
    assert len(PpoConfig.model_fields) <= 41
