"""Group-relative policy optimisation: rewards rise, the reference is the start, the tokens are our template's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import grpo, sft
from align.config import build
from align.data import load_records
from align.data.rendering.chat_template import stop_token_ids
from align.data.rendering.render_view import render_view
from align.errors import DataError, MachineError, PreemptedError, UsageError
from align.grpo import GrpoConfig
from align.registry import Registry, open_registry
from align.rewards import reward
from align.rl.vllm_settings import check_vllm, vllm_arguments
from align.training.command import main, run_stage

CLOCKS = {"tokens_per_second", "tokens_per_second/rollout", "step_time"}
EGG = [{"name": "keyword", "args": {"words": ["e"]}}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_base, demonstrations) -> Registry:
    """A registry with an SFT adapter."""
    registry = open_registry(tmp_path_factory.mktemp("grpo") / "registry")
    words = [
        "--registry", str(registry.root), f"model={tiny_base}", f"data={demonstrations}", "name=start", "max_steps=4",
        "bf16=false", "lora.r=4", "learning_rate=5e-3", "save_steps=0",
    ]  # fmt: skip
    assert main(sft.STAGE, words) == 0
    return registry


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [{"question": f"what is {n} and {n}", "answer": str(n + n)} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(sums):
    """Settings of a small run; a test changes what it is about."""
    return {
        "model": "start", "data": str(sums), "bf16": False, "max_length": 96, "learning_rate": 1e-2, "max_steps": 2,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "logging_steps": 1,
        "save_steps": 0, "warmup_ratio": 0.0, "rewards": EGG,
    }  # fmt: skip


def train(registry: Registry, settings: dict, name: str, *, resume: bool = False, **changed):
    return run_stage(
        grpo.STAGE, build(GrpoConfig, settings | {"name": name} | changed), registry, resume=resume
    ), logged(registry, name)


def folder_of(registry: Registry, name: str) -> Path:
    return sorted(registry.runs_dir(name).iterdir())[-1]


def logged(registry: Registry, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder_of(registry, name) / "metrics.jsonl").read_text().splitlines()]


def weights(registry: Registry, name: str) -> dict:
    return load_file(Path(registry.resolve(name).location) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def decided_base(tmp_path_factory, tiny_base) -> Path:
    """The tiny base with a louder head: its own can give no token much more probability than another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("decided")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model.get_input_embeddings().weight.data.mul_(20)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def test_the_reward_rises_and_the_policy_is_registered(shared, settings, decided_base):
    several = [{"name": "keyword", "args": {"words": ["e", "a", "o", "t"]}}]
    changed = {"per_device_train_batch_size": 32, "num_generations": 8, "learning_rate": 3e-2, "max_steps": 12}

    made, rows = train(shared, settings, "risen", model=str(decided_base), rewards=several, **changed)

    curve = [row["reward"] for row in rows]
    assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.2
    assert made.kind == "policy"
    assert made.manifest["metrics"]["reward"] == curve[-1]
    assert {"loss", "rewards/keyword/mean", "entropy", "learning_rate", *CLOCKS} <= rows[0].keys()
    assert all(row["num_tokens"] > 0 for row in rows)


@pytest.mark.parametrize("start", ["start", "base"])
def test_the_kl_is_zero_at_step_1_and_the_reference_stays(shared, settings, tiny_base, capsys, start):
    model = start if start == "start" else str(tiny_base)
    changed = {"beta": 0.1, "gradient_accumulation_steps": 2, "lora": {"r": 4, "dropout": 0.2}}

    _, rows = train(shared, settings, f"held-{start}", model=model, **changed)

    assert rows[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert rows[1]["kl"] > 1e-6
    told = capsys.readouterr().out
    assert "it equals the policy at step 0, so KL is 0" in told
    assert "step 1 as expected, policy equals reference" in told


def test_a_reward_reads_the_record_its_prompt_comes_from(shared, settings, sums):
    seen = []

    @reward(needs=("answer",))
    def spies(record, completion):
        seen.append((record.prompt[0]["content"], record.answer, completion))
        return float(len(completion))

    train(shared, settings, "spied", rewards=[{"name": "spies", "weight": 0.5}, *EGG, *EGG])

    asked = {record.prompt[0]["content"]: record.answer for record in load_records(str(sums), view="prompt").records}
    assert len(seen) == 16
    assert all(asked[prompt] == answer for prompt, answer, _ in seen)
    groups = [seen[place : place + 4] for place in range(0, 16, 4)]
    assert all(len({prompt for prompt, *_ in group}) == 1 for group in groups)
    assert len({group[0][0] for group in groups}) == 4
    row = logged(shared, "spied")[0]
    assert row["reward"] == pytest.approx(
        0.5 * row["rewards/spies/mean"] + row["rewards/keyword/mean"] + row["rewards/keyword-2/mean"],
        abs=1e-5,
    )
    samples = [json.loads(line) for line in (folder_of(shared, "spied") / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 2]
    assert samples[0]["completion"] == seen[0][2]
    assert samples[0]["score"] == 0.5 * len(seen[0][2]) + 2 * samples[0]["rewards"]["keyword"]


def test_it_generates_from_the_tokens_of_our_template_and_stops_where_it_stops(
    shared, settings, tiny_base, sums, monkeypatch
):
    from transformers import AutoTokenizer, GenerationMixin

    calls = []
    plain = GenerationMixin.generate

    def watched(self, *args, **inputs):
        made = plain(self, *args, **inputs)
        calls.append((inputs["input_ids"], inputs["attention_mask"], inputs["generation_config"], made))
        return made

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    train(shared, settings, "watched", temperature=0.7)

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = render_view("prompt", load_records(str(sums), view="prompt").records, tokenizer, 90).rows
    ours = {tuple(row["prompt_ids"]) for row in rows}
    assert len(calls) == 2
    for ids, mask, asked, _ in calls:
        found = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        assert set(found) <= ours
        assert found == [prompt for prompt in found[::4] for _ in range(4)]
        assert set(asked.eos_token_id) == set(stop_token_ids(tokenizer))
        assert (asked.temperature, asked.top_p, asked.max_new_tokens) == (0.7, 1.0, 6)


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_the_fast_path_changes_no_number(shared, settings, temperature, capsys):
    changed = {"beta": 0.05, "temperature": temperature, "num_iterations": 2, "max_steps": 2}

    rows = {
        fast: train(shared, settings, f"fast-{fast}-{temperature}".lower(), fast_path=fast, **changed)[1]
        for fast in (True, False)
    }

    assert "stock path is used" not in capsys.readouterr().out
    for ours, stock in zip(rows[True], rows[False], strict=True):
        for key in ours.keys() - CLOCKS:
            assert ours[key] == pytest.approx(stock[key], rel=1e-3, abs=1e-5), key


def test_the_loss_curve_equals_plain_trl_on_the_same_prompts(shared, settings, tiny_base, sums, tmp_path):
    """Texts that the trainer renders itself: for this template its tokens are ours."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from align.rl.rollout import PromptStream

    _, ours = train(shared, settings, "ours", fast_path=False, beta=0.1)
    records = load_records(str(sums), view="prompt").records
    order = PromptStream(len(records), 0).take(4)

    def egg(completions, **_):
        return [float("e" in completion[0]["content"].casefold()) for completion in completions]

    trainer = GRPOTrainer(
        model=PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
            shared.resolve("start").location, is_trainable=True,
        ),
        reward_funcs=egg,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4, beta=0.1,
            max_completion_length=6, learning_rate=1e-2, warmup_steps=0, lr_scheduler_type="cosine", seed=0, bf16=False,
            activation_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False, shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": records[place].prompt} for place in order]),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    trainer.train()

    plain = [line for line in trainer.state.log_history if "loss" in line]
    for key in ("loss", "reward", "kl"):
        assert [line[key] for line in ours] == [line[key] for line in plain]


@pytest.mark.parametrize("stop", [1, 4], ids=["in the first rollout", "into the second epoch"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(shared, settings, monkeypatch, stop):
    """Four rollouts of two steps each take two prompts at a time, of five in all."""
    import signal

    from align.training.run_log import RunLog

    changed = {"num_iterations": 2, "max_steps": 8, "beta": 0.1, "data": f"{settings['data']}:limit=5"}
    if not shared.names().count("straight"):
        train(shared, settings, "straight", **changed)
    plain = RunLog.write

    def write(self, step, numbers):
        plain(self, step, numbers)
        if step == stop:
            signal.raise_signal(signal.SIGTERM)

    name = f"cut-{stop}"
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", write)
        with pytest.raises(PreemptedError, match=f"stopped at step {stop + 2 - stop % 2} of 8"):
            train(shared, settings, name, **changed)
    _, rows = train(shared, settings, name, resume=True, **changed)

    expected = weights(shared, "straight")
    assert all(torch.equal(value, expected[key]) for key, value in weights(shared, name).items())
    assert [{key: row[key] for key in row.keys() - CLOCKS} for row in rows] == [
        {key: row[key] for key in row.keys() - CLOCKS} for row in logged(shared, "straight")
    ]
    samples = (folder_of(shared, name) / "samples.jsonl").read_text()
    assert samples == (folder_of(shared, "straight") / "samples.jsonl").read_text()


def test_checkpoints_lie_at_rollout_boundaries(shared, settings, capsys):
    train(shared, settings, "saved", num_iterations=2, max_steps=3, save_steps=1)

    assert "a rollout lasts 2 steps, so every 2 are saved" in capsys.readouterr().out
    # The last one is that of the end, from which nothing goes on.
    kept = {path.name for path in folder_of(shared, "saved").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-3"}


@pytest.mark.parametrize(
    ("batch", "accumulation", "passes", "iterations", "unit", "prompts"),
    [(8, 1, None, 1, 1, 2), (8, 4, None, 1, 1, 8), (8, 4, None, 3, 3, 8), (8, 2, 4, 1, 2, 8), (8, 4, 2, 1, 1, 8)],
)
def test_a_unit_is_what_lies_between_two_rollout_boundaries(batch, accumulation, passes, iterations, unit, prompts):
    config = GrpoConfig(
        model="m", data="d", name="n", rewards=EGG, num_generations=4, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, num_iterations=iterations,
        trainer={} if passes is None else {"steps_per_generation": passes},
    )  # fmt: skip

    assert (config.save_unit, config.prompts_per_unit) == (unit, prompts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_generations": 3}, "num_generations: 3 does not divide .* = 8; groups must be whole"),
        ({"num_generations": 1}, "num_generations: 1 is too small; give 2 or more"),
        ({"max_completion_length": 96}, "max_completion_length: 96 leaves no room for a prompt in max_length=96"),
        ({"rewards": []}, "rewards"),
        ({"rewards": [{"name": "keywrod"}]}, "did you mean keyword"),
        ({"reward_model": "judge"}, "train on a reward model with align ppo"),
        ({"eval_data": "d"}, "eval_data: unknown setting"),
        ({"beta": -0.1}, "beta"),
        ({"loss_type": "ppo"}, "loss_type"),
        ({"trainer": {"generation_batch_size": 8}}, "give steps_per_generation instead"),
        ({"trainer": {"steps_per_generation": 0}}, "expected a whole number above 0"),
        ({"lora": "none"}, "lora: this stage trains adapters only"),
        ({"reward_model": "judge"}, r"rewards=\[\{name: learned, args: \{model: judge\}\}\]"),
        ({"vllm": {"mode": "server"}}, "vllm.mode=server: give vllm.server_base_url=http://HOST:PORT"),
        ({"vllm": {"server_base_url": "http://here:8000"}}, "found vllm.mode=colocate; set vllm.mode=serv"),
        ({"vllm": {"mode": "server", "server_base_url": "here:8000"}}, "expected http://HOST:PORT"),
        ({"vllm": {"mode": "remote"}}, "vllm.mode"),
        ({"vllm": {}, "quantization": "int8"}, "vLLM loads no int8 base; give nf4 or none"),
        ({"vllm": {}, "trainer": {"generation_kwargs": {"seed": 1}}}, "trainer.generation_kwargs: with vllm"),
    ],
)
def test_wrong_numbers_are_refused(settings, changed, message):
    with pytest.raises(UsageError, match=message):
        build(GrpoConfig, settings | {"name": "n"} | changed)


def test_prompts_without_an_answer_are_refused_before_anything_is_loaded(shared, settings, preferences):
    with pytest.raises(DataError, match="numeric_match: needs the field answer"):
        train(shared, settings, "none", data=str(preferences), rewards=[{"name": "numeric_match"}])


def test_completions_that_all_score_the_same_are_told_and_end_no_run(shared, settings, capsys):
    flat = [{"name": "regex", "args": {"pattern": "never in any completion"}}]

    train(shared, settings, "flat", rewards=flat, max_steps=12)

    assert "warning: at the end all completions of every group scored the same" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
@pytest.mark.parametrize(
    "words", [["vllm.mode=colocate"], ["vllm.mode=server", "vllm.server_base_url=http://127.0.0.1:9"]]
)
def test_vllm_that_is_not_there_is_told_before_anything_is_loaded(shared, sums, capsys, words):
    asked = ["model=start", f"data={sums}", "name=fast", "rewards=[{name: numeric_match}]", "bf16=false", *words]

    assert main(grpo.STAGE, ["--registry", str(shared.root), *asked]) == 2

    assert "vllm: vllm is not installed; pip install 'trl[vllm]', or generate without it" in (capsys.readouterr().err)


def test_trl_is_told_where_vllm_runs_and_where_answers_end(settings):
    from trl import GRPOConfig

    url = "http://127.0.0.1:8000"
    config = build(GrpoConfig, settings | {"name": "n", "vllm": {"mode": "server", "server_base_url": url}})

    told = GRPOConfig(
        output_dir="unused", bf16=False, report_to=[], activation_checkpointing=False, **vllm_arguments(config, [2, 3])
    )

    assert (told.use_vllm, told.vllm_mode, told.vllm_server_base_url) == (True, "server", url)
    assert told.vllm_max_model_length == 96
    assert told.generation_kwargs == {"stop_token_ids": [2, 3]}
    assert vllm_arguments(build(GrpoConfig, settings | {"name": "n"}), [2]) == {}


def test_a_server_that_does_not_answer_is_told_with_the_command_that_starts_one(settings, monkeypatch):
    config = build(
        GrpoConfig, settings | {"name": "n", "vllm": {"mode": "server", "server_base_url": "http://127.0.0.1:9/"}}
    )
    # As on a machine that has both.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    with pytest.raises(MachineError, match=r"http://127\.0\.0\.1:9: no server answers there .*vllm serve /the/base"):
        check_vllm(config, "/the/base")


def test_no_gpu_is_told(settings, monkeypatch):
    config = build(GrpoConfig, settings | {"name": "n", "vllm": {}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    with pytest.raises(UsageError, match="vllm: found no GPU"):
        check_vllm(config, "/the/base")


def test_a_reward_that_fails_ends_the_run_with_its_name_the_completion_and_the_row(shared, sums, capsys):
    asked = [
        "model=start",
        f"data={sums}",
        "name=failed",
        "rewards=[{name: length, args: {target: 2}}, {name: small_world}]",
    ]
    small = [
        "max_length=96",
        "max_completion_length=6",
        "num_generations=4",
        "per_device_train_batch_size=8",
        "bf16=false",
    ]

    assert main(grpo.STAGE, ["--registry", str(shared.root), *asked, *small]) == 3

    told = capsys.readouterr().err
    assert "error: reward small_world: raised DataError for the completion '" in told
    assert f" of {sums}:" in told
    assert "failed" not in shared.names()
