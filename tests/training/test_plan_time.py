"""The time and the advice of a plan: every stage is tried out, and only what a stage takes is advised."""

from __future__ import annotations

import importlib
import json
import re
from functools import partial
from types import SimpleNamespace

import numpy
import pytest

from align.command_line import read_command_line
from align.config import build
from align.models.tokenizers import load_tokenizer
from align.registry import open_registry
from align.sft import SftConfig
from align.training import advice
from align.training.planned_step import PlannedStep, fullest_share, padding_share
from align.training.ranks import Ranks
from align.training.step_time import StepTime, StepTimer
from align.training.training_data import TrainingData

FREE = 1 << 34
LENGTH = "rewards=[{name: length, args: {target: 20}}]"
SHORT = ["sampling.max_new_tokens=8", "rollout_batch_size=4"]
TEXT = "data={root}/texts.jsonl"
STAGES = {
    "sft": ["packing=true", "bf16=true", "gradient_checkpointing=true"],
    "sft full": ["lora=none", "fast_path=false"],
    "dpo": ["model=start"],
    "kto": ["model=start"],
    "reward": ["model=start"],
    "ppo": ["model=start", "reward_model=judge", "num_ppo_epochs=2", *SHORT],
    "grpo": [LENGTH, "num_generations=2", "max_completion_length=8"],
    "pretrain": ["model=scratch:tiny", TEXT, "block_size=32"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_base, no_pictures):
    """A registry with a base, an adapter on it and a reward model, and rows that serve every stage."""
    root = tmp_path_factory.mktemp("plans")
    chat = [{"prompt": [{"role": "user", "content": f"Say {row}"}],
             "chosen": [{"role": "assistant", "content": "one two " * (2 + row % 5)}],
             "rejected": [{"role": "assistant", "content": "no " * (1 + row % 3)}]} for row in range(24)]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    texts = ({"text": f"the number {row} is a number " * 4} for row in range(60))
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for name, stage in (("start", "sft"), ("judge", "reward")):
        module = importlib.import_module(f"align.{stage}")
        words = [f"model={tiny_base}", f"data={root / 'rows.jsonl'}", f"name={name}", "max_steps=1", "warmup_ratio=0"]
        run = partial(module.main, module.STAGE) if stage == "sft" else module.main
        assert run([*words, "--registry", str(root)]) == 0
    return root


def _timer(root, tiny_base, stage, *words):
    stage = importlib.import_module(f"align.{stage}").STAGE
    given = [f"model={tiny_base}", f"data={root / 'rows.jsonl'}", "name=plan", "max_length=128"]
    words = [word.replace("{root}", str(root)) for word in words]
    config = build(stage.config, read_command_line([*given, "per_device_train_batch_size=4", *words]).values)
    registry = open_registry(root)
    data = TrainingData(stage, config, registry, Ranks(), notify=lambda _: None)
    parent = registry.resolve(config.model) if config.references else None
    tokenizer = load_tokenizer(registry.resolve(str(tiny_base)))
    tokens = data.tokenise_records(data.train, tokenizer, root / "cache" / "tokens")
    step = PlannedStep(stage, config, registry, parent, tokens)
    return StepTimer(step, data.train, tokens.rows, 10, 1_000_000, FREE)


@pytest.mark.parametrize("case", STAGES)
def test_every_stage_is_timed(root, tiny_base, case, capsys):
    took = _timer(root, tiny_base, case.split()[0], *STAGES[case]).estimate()

    assert 0 < took.low <= took.seconds <= took.high
    assert took.total >= 10 * took.seconds
    assert (took.before > 0) == (case in ("dpo", "kto"))
    assert (took.new_tokens_per_second is not None) == (case in ("ppo", "grpo"))
    assert capsys.readouterr().out == ""
    assert not (root / "runs" / "plan").exists()


def test_the_time_of_a_step_grows_with_its_rows_and_layers(root, tiny_base):
    timer = _timer(root, tiny_base, "sft")
    config = timer.step.config
    more = config.model_copy(update={"gradient_accumulation_steps": 3})
    whole = timer._whole_step(config, {"step": 2.0})
    assert timer._whole_step(more, {"step": 2.0}) == pytest.approx(3 * whole)

    small = repr(config.for_trial(timer._rows_of_trial(config)))
    for depth, seconds in ((1, [9.0, 1.0, 1.2]), (5, [9.0, 1.5, 1.9])):
        timer._clocks[depth, small] = SimpleNamespace(seconds=seconds, numbers=[{}])
    timer.__dict__["_layers"] = 9
    assert timer._phases(config, max) == {"step": pytest.approx(2.6)}
    assert timer._phases(config, min) == {"step": pytest.approx(2.0)}


def test_a_prompt_that_two_answers_share_is_computed_once_on_the_fast_path_alone(root, tiny_base):
    fast, stock = (_timer(root, tiny_base, "dpo", "model=start", f"fast_path={path}") for path in (True, False))
    filled = [timer.step.training_pass(timer.step.config).filled for timer in (fast, stock)]

    share = fast.step.tokens.shared_share()
    assert share > 0
    assert filled[0] == pytest.approx((1 - share) * fullest_share(fast.step.config, fast.step.lengths))
    assert filled[1] == 1 - padding_share(stock.step.config, stock.step.lengths)


@pytest.mark.parametrize(("rows", "share"), [(1, 1.0), (4, 16 / 40), (8, 16 / 80)])
def test_memory_is_planned_for_the_fullest_batch(rows, share):
    lengths = numpy.array([[1], [2], [3], [10]])
    settings = {"model": "m", "data": "d", "name": "n", "per_device_train_batch_size": rows}

    assert fullest_share(build(SftConfig, settings), lengths) == share
    assert fullest_share(build(SftConfig, settings | {"packing": True}), lengths) == 1


def test_rows_of_a_rollout_that_decode_together_take_less_than_one_after_the_other(root, tiny_base, monkeypatch):
    monkeypatch.setattr("align.training.step_time._STEP_S", 0.0)  # one row is tried
    timer = _timer(root, tiny_base, "ppo", *STAGES["ppo"], "rollout_batch_size=16")
    config = timer.step.config
    monkeypatch.setattr(StepTimer, "_speed", 1e30)  # prompts are read at no cost

    monkeypatch.setattr(StepTimer, "_growth", lambda self, few, many: 3.0)
    assert timer._rollout_seconds(config, 2.0) == pytest.approx(6.0)
    monkeypatch.setattr(StepTimer, "_growth", lambda self, few, many: 99.0)
    assert timer._rollout_seconds(config, 2.0) == pytest.approx(32.0)


def test_a_dry_run_says_the_time(root, tiny_base, capsys):
    from align import sft
    from align.training.command import main

    words = [f"model={tiny_base}", f"data={root / 'rows.jsonl'}", "name=plan", "bf16=true", "--dry-run"]
    assert main(sft.STAGE, [*words, "--registry", str(root)]) == 0

    printed = capsys.readouterr().out
    number = r"[\d.]+(e-\d+)? (s|min|h)"
    line = rf"^time       about {number} a step \({number} to {number}\), {number} in all; an estimate"
    assert re.search(line, printed, re.M), printed


def test_what_cannot_be_tried_out_is_said_and_the_plan_stands(root, tiny_base):
    from align.training.plan import _estimate_time

    timer = _timer(root, tiny_base, "sft")
    timer.free = 1000

    first = next(iter(_estimate_time(timer, {"model": timer.step.parent})))

    assert first.startswith("time       not estimated: steps on 2 layers need about 0.0 GiB, and 0.0 GiB are free")


def _advice(timer, free):
    return list(advice.advise(timer.step, {"model": timer.step.parent}, free, None, None))


def test_where_memory_is_short_what_saves_it_is_advised_with_its_size(root, tiny_base):
    timer = _timer(root, tiny_base, "sft", "per_device_train_batch_size=8")
    whole = timer.step.memory(timer.step.config)["total"]

    lines = _advice(timer, int(0.9 * whole))

    half = "per_device_train_batch_size=4 gradient_accumulation_steps=2: "
    assert any(line.startswith(half) for line in lines), lines
    assert any("which fits" in line for line in lines)
    assert not any("fast_path" in line or "packing" in line for line in lines)


def test_nothing_is_advised_that_the_stage_refuses(root, tiny_base):
    lines = _advice(_timer(root, tiny_base, "sft", "lora=none"), 1000)

    assert lines
    assert not any("nf4" in line for line in lines)
    assert "is still too much" in lines[-1]


def test_without_need_nothing_is_advised(root, tiny_base):
    assert _advice(_timer(root, tiny_base, "sft"), FREE) == []


def test_nothing_is_tried_to_shorten_a_run_of_less_than_a_minute(root, tiny_base):
    timer = _timer(root, tiny_base, "sft", "bf16=false")

    lines = list(advice.advise(timer.step, {"model": timer.step.parent}, FREE, timer, StepTime(5.0, 5.0, 5.0, 10)))

    assert lines == []
    assert timer._clocks == {}
    assert len(timer.step._sizes) == 1  # nor is the memory of other settings computed


def test_times_are_said_in_the_unit_that_fits():
    assert [advice.seconds_text(seconds) for seconds in (0.123, 12.4, 600, 7300)] == ["0.12 s", "12 s", "10 min", "2 h"]
