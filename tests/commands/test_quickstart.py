import json
import re

import pytest

from align.quickstart import main, plan_steps, print_next_steps
from align.registry import open_registry

NAMES = ["world-base", "world-dpo", "world-grpo", "world-kto", "world-ppo", "world-reward", "world-sft"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_stage_is_better_than_the_one_before_and_a_second_run_reuses_everything(tmp_path, capsys):
    assert main(["--registry", str(tmp_path)]) == 0

    registry = open_registry(tmp_path)
    assert registry.names() == NAMES
    assert registry.verify() == []
    gold = gold_scores(tmp_path)
    aligned = [gold[name] for name in ("world-dpo", "world-kto", "world-ppo", "world-grpo")]
    assert gold["world-base"]["high"] < gold["world-sft"]["low"]
    assert all(gold["world-sft"]["high"] < each["low"] for each in aligned), gold
    printed = capsys.readouterr().out
    assert "KL, nats a completion" in printed
    assert "world-reward@v1" in printed
    assert "world-ppo@v1" in (tmp_path / "world/report.html").read_text(encoding="utf-8")

    capsys.readouterr()
    assert main(["--registry", str(tmp_path)]) == 0

    printed = capsys.readouterr().out
    assert len(re.findall(r"@v1 was made from the same settings, parents and data; reused", printed)) == 7
    assert {name: len(registry.versions(name)) for name in NAMES} == dict.fromkeys(NAMES, 1)
    assert gold_scores(tmp_path) == gold


def gold_scores(registry):
    """The gold score of each model with its interval, by name."""
    found = json.loads((registry / "world/scores.json").read_text(encoding="utf-8"))
    return {model["reference"].partition("@")[0]: model["metrics"]["gold"] for model in found["models"]}


def test_every_step_names_parents_that_an_earlier_step_makes():
    steps = plan_steps(seed=5)

    made = set()
    for step in steps:
        needed = {step.config.model, getattr(step.config, "reward_model", None)} - {None, "scratch:nano"}
        assert needed <= made
        assert step.config.seed == 5
        made.add(step.config.name)
    assert sorted(made) == NAMES


def test_help_comes_without_a_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert main(["--help"]) == 0

    assert "seed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("switch", ["--dry-run", "--resume", "--print_config"])
def test_switches_of_a_single_run_are_refused(capsys, switch):
    assert main([switch]) == 2
    assert "takes seed and --registry only" in capsys.readouterr().err


def test_a_misspelt_setting_is_refused(capsys):
    assert main(["sed=1"]) == 2
    assert "did you mean seed" in capsys.readouterr().err


def test_next_commands_name_a_registry_only_when_it_is_not_the_default(registry, capsys):
    print_next_steps(registry, default=True)
    assert "--registry" not in capsys.readouterr().out

    print_next_steps(registry, default=False)
    assert f"--registry {registry.root}" in capsys.readouterr().out
