import json
import re

import pytest

from align.config import write
from align.quickstart import main, plan, tell_next
from align.registry import open_registry

NAMES = ["world-base", "world-dpo", "world-kto", "world-ppo", "world-reward", "world-sft"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_stage_is_better_than_the_one_before_and_a_second_run_reuses_everything(tmp_path, capsys):
    from align.evaluation import Interval

    assert main(["--registry", str(tmp_path)]) == 0

    registry = open_registry(tmp_path)
    assert registry.names() == NAMES
    assert registry.verify() == []
    rows = {row["label"]: row for row in json.loads((tmp_path / "world/scores.json").read_text(encoding="utf-8"))}
    gold = {label: Interval(**row["gold"]) for label, row in rows.items()}
    aligned = [gold[label] for label in ("DPO", "KTO", "PPO")]
    assert gold["base"].mean < gold["SFT"].mean < min(each.mean for each in aligned), gold
    best = max(aligned, key=lambda interval: interval.mean)
    assert gold["base"].high < gold["SFT"].low
    assert gold["SFT"].high < best.low, gold

    capsys.readouterr()
    assert main(["--registry", str(tmp_path)]) == 0

    printed = capsys.readouterr().out
    assert len(re.findall(r"@v1 was made from the same settings, parents and data; reused", printed)) == 6
    assert {name: len(registry.versions(name)) for name in NAMES} == dict.fromkeys(NAMES, 1)
    again = {row["label"]: row for row in json.loads((tmp_path / "world/scores.json").read_text(encoding="utf-8"))}
    assert again == rows


def test_every_step_names_parents_that_an_earlier_step_makes():
    steps = plan(seed=5)

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


def test_a_misspelt_setting_is_refused(capsys):
    assert main(["sed=1"]) == 2
    assert "Did you mean seed" in capsys.readouterr().err


def test_next_commands_name_a_registry_only_when_it_is_not_the_default(registry, capsys):
    tell_next(registry, default=True, say=write)
    assert "--registry" not in capsys.readouterr().out

    tell_next(registry, default=False)
    assert f"--registry {registry.root}" in capsys.readouterr().out
