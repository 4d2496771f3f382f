"""The benchmark of training steps: it compares only what trains the same tokens, and on a real model ours are TRL's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAGES = ("sft", "dpo", "kto", "reward")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_model

    return real_model


def options_of(benchmark, root: Path, *words: object):
    known = ["--registry", root / "registry", "--batch", 2, "--rounds", 1, "--no-memory"]
    return benchmark.parser().parse_args([str(word) for word in (*known, *words)])


@pytest.mark.parametrize("stage", [*STAGES, "ppo"])
def test_every_stage_is_timed_on_every_path(benchmark, tmp_path, tiny_base, stage, capsys):
    options = options_of(benchmark, tmp_path, "--model", tiny_base, "--answer", 6, "--max-length", 1024)

    found = benchmark.run_case(options, stage, "fp32")["result"]

    stock = "a loop around generate()" if stage == "ppo" else "TRL"
    assert {stock, "align"} <= found.keys()
    assert ("full logits" in found) == (stage in ("sft", "dpo", "kto"))
    assert all(0 < row["lowest"] <= row["times as fast"] <= row["highest"] for row in found.values())
    assert "align\n" in capsys.readouterr().out


def test_steps_that_train_other_tokens_are_not_compared(benchmark, tmp_path, tiny_base, capsys):
    options = options_of(benchmark, tmp_path, "--model", tiny_base, "--max-length", 8192, "--trl-tokenises")

    with pytest.raises(SystemExit, match=r"^not compared: TRL trains other tokens than align$|losses of one batch"):
        benchmark.run_case(options, "sft", "fp32")

    assert "TRL trains beside align's tokens: '\\n' after '<|im_end|>', in 2 answers\n" in capsys.readouterr().out


def test_unequal_losses_are_not_compared(benchmark, tmp_path, tiny_base, monkeypatch):
    options = options_of(benchmark, tmp_path, "--model", tiny_base, "--max-length", 2048)
    compared = benchmark.require_equal

    def on_another_batch(trainer, variants, ours, stock, dtype):
        labels = stock["labels"].masked_fill(stock["labels"] != -100, 5)
        return compared(trainer, variants, ours, stock | {"labels": labels}, dtype)

    monkeypatch.setattr(benchmark, "require_equal", on_another_batch)

    with pytest.raises(SystemExit, match=r"^not compared: the losses of one batch differ by \d.*, 0.0001 is allowed: "):
        benchmark.run_case(options, "sft", "fp32")


def test_too_few_rows_are_said(benchmark, tmp_path, tiny_base):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = options_of(benchmark, tmp_path, "--model", tiny_base, "--data", path)

    with pytest.raises(SystemExit, match=r"one\.jsonl: 1 rows of at most 512 tokens, 2 needed; give more"):
        benchmark.run_case(options, "sft", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_first_step_on_a_real_model_has_the_loss_and_gradients_of_trl(benchmark, smollm2_registry, stage):
    words = ["--registry", smollm2_registry, "--batch", 2, "--rounds", 1, "--max-length", 320]

    # It ends the process where a loss differs by 1e-4, or a gradient norm by 1e-3.
    loss = benchmark.check_first_step(benchmark.parser().parse_args([str(word) for word in words]), stage, "fp32")

    assert 0.1 < loss < 10
