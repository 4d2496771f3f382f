"""The time estimate of `--dry-run` against steps of the whole model, in one process, each twice in alternation.

    python benchmarks/time_plan.py --registry DIR --model smollm2           # every stage
    python benchmarks/time_plan.py --registry DIR --model smollm2 sft-fp32  # one

Times are seconds of the processor, so that other work on the machine does not count; a dry run measures with the clock.
The real steps are made on rows of mean length, as many as a step of the run has. Prompts ask for long stories, since a
plan takes every sampled answer to be as long as it may be.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.command_line import read_command_line
from align.config import build
from align.models.tokenizers import load_tokenizer
from align.registry import open_registry
from align.training import step_time, trial
from align.training.advice import free_memory
from align.training.checkpoints import Continuation
from align.training.planned_step import PlannedStep
from align.training.ranks import Ranks
from align.training.run import Run
from align.training.step_time import StepTimer
from align.training.training_data import TrainingData

LOG_NORMAL = (5.0, 0.7)
"""mean and deviation of the logarithms of the lengths of real demonstrations"""

REWARD = "rewards=[{name: length, args: {target: 20}}]"
CASES = {
    "sft-fp32": ["sft", "bf16=false"],
    "sft-bf16": ["sft", "bf16=true"],
    "sft-fp32-checkpointing": ["sft", "bf16=false", "gradient_checkpointing=true"],
    "sft-fp32-packing": ["sft", "bf16=false", "packing=true", "per_device_train_batch_size=2"],
    "dpo-fp32": ["dpo", "bf16=false"],
    "dpo-bf16": ["dpo", "bf16=true"],
    "kto-fp32": ["kto", "bf16=false"],
    "reward-fp32": ["reward", "bf16=false"],
    "ppo-fp32": [
        "ppo", "bf16=false", REWARD, "rollout_batch_size=16", "num_ppo_epochs=2", "sampling.max_new_tokens=48",
    ],
    "grpo-fp32": [
        "grpo", "bf16=false", REWARD, "num_generations=4", "per_device_train_batch_size=8", "max_completion_length=48",
    ],
}  # fmt: skip


class _Clock:
    perf_counter = staticmethod(time.process_time)


def compare(name: str, options: argparse.Namespace) -> None:
    """Print estimated and real seconds of a case, in pairs."""
    stage_name, *words = CASES[name]
    stage = importlib.import_module(f"align.{stage_name}").STAGE
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        root = Path(folder)
        write_rows(root / "rows.jsonl", stage.view)
        registry = open_registry(options.registry)
        given = [f"model={options.model}", f"data={root / 'rows.jsonl'}", "name=t", "max_length=512"]
        batch = "per_device_train_batch_size=4"
        config = build(stage.config, read_command_line([*given, batch, "on_long=drop", *words]).values)
        parent = registry.resolve(config.model)
        data = TrainingData(stage, config, registry, Ranks(), notify=lambda _: None)
        data.read()
        base = registry.resolve_base(parent) if parent.is_adapter else parent
        tokens = data.tokenise_records(data.train, load_tokenizer(base), root / "cache")
        step = PlannedStep(stage, config, registry, parent, tokens)
        pairs = []
        for turn in range(options.rounds):
            begun = time.process_time()
            took = StepTimer(step, data.train, tokens.rows, 1, 0, free_memory()).estimate()
            spent = time.process_time() - begun
            pairs.append((took.seconds, real_step(step, data.train, tokens.rows, root / str(turn)), spent, took))
    del printed
    for took, real, spent, estimate in pairs:
        speed = estimate.new_tokens_per_second
        times = f"estimated {took:6.2f} s a step in {spent:4.1f} s, real {real:6.2f}, {took / real:.2f}"
        print(f"{name:<24} {times}{f', {speed:.0f} new tokens a second' if speed else ''}", flush=True)


def real_step(step: PlannedStep, records: Any, rows: Any, folder: Path) -> float:
    """Return the mean seconds of steps of the whole model under the settings of the run."""
    changes = {"max_steps": 3, "logging_steps": 1, "save_steps": 0, "warmup_ratio": 0.0}
    config = step.config.model_copy(update=changes)
    timer = StepTimer(step, records, rows, 1, 0, 0)
    folder.mkdir()
    run = Run(step.stage, config, step.registry, folder, Ranks(), Continuation())
    clock = trial.StepClock(folder)
    run.data = trial.TrialRows(records, rows.select(timer._average_rows(config)))
    run.log = clock
    step.stage.run(config, run)
    return mean(clock.seconds[1:])


def write_rows(path: Path, view: str) -> None:
    """Write rows with answers as long as real ones, in the shape of a view; a 7 is one token."""
    drawn = random.Random(0)
    rows = []
    for row in range(64):
        asked = [{"role": "user", "content": f"Tell a long story about {row} sailors."}]
        first, second = (
            [{"role": "assistant", "content": "7" * min(440, 8 + int(drawn.lognormvariate(*LOG_NORMAL)))}]
            for _ in range(2)
        )
        answers = {"chosen": first, "rejected": [{"role": "assistant", "content": second[0]["content"] + "8"}]}
        if view == "unpaired":
            answers = {"completion": first, "label": row % 2 == 0}
        elif view != "preference":
            answers = {"completion": first}
        rows.append({"prompt": asked, **answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--registry", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    step_time.time = trial.time = _Clock
    for name in options.cases:
        compare(name, options)


if __name__ == "__main__":
    main()
