"""Rewards in a file of the user's own: found by name, refused with file and line, and in whole runs of PPO and GRPO."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from align import grpo, ppo
from align.config import build, dump_yaml
from align.errors import DataError, UsageError
from align.ppo import PpoConfig
from align.rewards import find_reward
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.schema import Record
from align.training.command import main

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """from align.rewards import reward
from words import WORD

@reward
def has_word(record, completion, factor: float = 1.0):
    return factor * completion.count(WORD)

@reward
def divides(record, completion):
    return inverse(len(completion))

def inverse(number):
    return 1 / (number - number)

@reward(batched=True)
def length(records, completions):
    return [len(completion) for completion in completions]

@reward
def says_nothing(record, completion):
    pass

def undecorated(record, completion):
    return 1.0
"""
ROW = Record(source="a.jsonl", line=7)


@pytest.fixture
def own_file(tmp_path) -> Path:
    (tmp_path / "words.py").write_text("WORD = 'e'\n")
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def load(name, file, **args):
    return WeightedRewards([build(RewardSettings, {"name": name, "file": str(file), "args": args})])


def test_a_reward_of_a_file_scores_and_may_import_what_lies_beside_it(own_file):
    rewards = load("has_word", own_file, factor=2)

    assert rewards.score_all([ROW, ROW], ["eel", "no"]) == [{"has_word": 4.0}, {"has_word": 0.0}]


def test_the_example_scores_the_share_of_short_lines():
    rewards = load("short_steps", ROOT / "examples" / "own_reward.py", words=2)

    assert rewards.score_all([ROW], ["one two\none two three"]) == [{"short_steps": 0.5}]


def test_a_digest_stands_beside_the_file_and_nothing_beside_a_built_in_reward(own_file):
    rewards = [{"name": "has_word", "file": str(own_file)}, {"name": "numeric_match"}]
    config = build(PpoConfig, {"model": "m", "data": "d", "name": "n", "rewards": rewards})

    own, built_in = yaml.safe_load(dump_yaml(config))["rewards"]

    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    assert own == {"name": "has_word", "file": str(own_file), "digest": digest, "weight": 1.0, "args": {}}
    assert built_in == {"name": "numeric_match", "weight": 1.0, "args": {}}


def test_settings_with_another_digest_are_refused(own_file):
    saved = build(RewardSettings, {"name": "has_word", "file": str(own_file)}).model_dump()
    own_file.write_text(SOURCE + "#")

    with pytest.raises(UsageError, match=r"reward has_word: file .*my_rewards.py: its sha256 is .*; restore the file"):
        build(RewardSettings, saved)
    assert load("has_word", own_file).score_all([ROW], ["e"]) == [{"has_word": 1.0}]


def test_its_names_are_its_own_and_hide_no_built_in_reward(own_file):
    mine, built_in = {"name": "length", "file": str(own_file)}, {"name": "length", "args": {"target": 2}}
    rewards = WeightedRewards([build(RewardSettings, settings) for settings in (mine, built_in)])

    assert rewards.score_all([ROW], ["one two"]) == [{"length": 7.0, "length-2": 1.0}]
    with pytest.raises(UsageError, match="no reward has that name"):
        find_reward("has_word")


def test_a_changed_file_is_read_again(own_file):
    load("has_word", own_file)
    own_file.write_text(SOURCE.replace("factor * ", "10 * "))

    assert load("has_word", own_file).score_all([ROW], ["e"]) == [{"has_word": 10.0}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("has_wrod", "rewards: asked for 'has_wrod'; no @reward of .*my_rewards.py has that name; it has divides, "
         "has_word, length, says_nothing; did you mean has_word"),
        ("undecorated", "rewards: undecorated: .*my_rewards.py has this function without @reward; write @reward above"),
    ],
)  # fmt: skip
def test_a_name_that_the_file_lacks_lists_those_it_has(own_file, name, message):
    with pytest.raises(UsageError, match=message):
        load(name, own_file)


def test_wrong_arguments_are_refused_with_the_settings(own_file):
    with pytest.raises(UsageError, match=r"rewards: has_word: factor: should be a valid number, .*, found 'much'"):
        load("has_word", own_file, factor="much")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n  pass", r"rewards: x: file .*my_rewards.py:1: SyntaxError: .*; correct the file"),
        ("\n\nimport no_such_module_of_mine", r"file .*my_rewards.py:3: ModuleNotFoundError: .*no_such_module_of_mine"),
        ("def f():\n  return {}['k']\nf()", r"file .*my_rewards.py:2 in f: KeyError: "),
        ("import sys\nsys.exit(3)", r"file .*my_rewards.py:2: SystemExit: '3'"),
        ("x = 1", "no @reward of .*my_rewards.py has that name; it has none; decorate one"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(tmp_path, source, message):
    path = tmp_path / "my_rewards.py"
    path.write_text(source)

    with pytest.raises(UsageError, match=message):
        load("x", path)


def test_a_file_that_is_not_there_is_named_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UsageError, match=f"reward x: file mine.py: cannot be read from {tmp_path} .*; give a Python"):
        load("x", "mine.py")


def test_an_error_while_scoring_names_file_line_and_function(own_file):
    with pytest.raises(DataError, match=r"divides: raised ZeroDivisionError at .*my_rewards.py:13 in inverse for the"):
        load("divides", own_file).score_all([ROW], ["x"])
    with pytest.raises(DataError, match=r"says_nothing \(.*my_rewards.py:19\): returned None for the completion"):
        load("says_nothing", own_file).score_all([ROW], ["x"])


@pytest.fixture
def words(registry, tiny_base, tmp_path) -> list[str]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": f"what is {n}", "answer": str(n)}) + "\n" for n in range(6)))
    return [
        "--registry", str(registry.root), f"model={tiny_base}", f"data={path}", "bf16=false", "max_steps=2",
        "max_length=64", "lora.r=2", "name=own",
    ]  # fmt: skip


STAGES = [
    (ppo.STAGE, ["rollout_batch_size=4", "per_device_train_batch_size=2", "sampling.max_new_tokens=5"]),
    (grpo.STAGE, ["per_device_train_batch_size=4", "num_generations=2", "max_completion_length=5", "logging_steps=1"]),
]


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_a_run_learns_from_a_reward_of_a_file_and_records_its_digest(registry, words, own_file, stage, settings):
    rewards = f"rewards=[{{name: has_word, file: {own_file}, args: {{factor: 3}}}}, {{name: numeric_match}}]"

    assert main(stage, [*words, *settings, rewards]) == 0

    made = registry.resolve("own")
    rows = [json.loads(line) for line in (Path(made.location) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if any(key.startswith("rewards/has_word") for key in row)] == [1, 2]
    saved = made.manifest["config"]["rewards"][0]
    assert saved["digest"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert yaml.safe_load((Path(made.location) / "config.yaml").read_text())["rewards"][0] == saved


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_an_error_of_the_file_ends_the_run_with_exit_code_3(words, own_file, capsys, stage, settings):
    assert main(stage, [*words, *settings, f"rewards=[{{name: divides, file: {own_file}}}]"]) == 3

    error = capsys.readouterr().err
    assert f"reward divides: raised ZeroDivisionError at {own_file}:13 in inverse for the completion" in error


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_a_run_is_resumed_with_the_same_file_and_refused_with_a_changed_one(
    registry, words, own_file, capsys, stage, settings
):
    stops = "import os, signal\nfrom align.rewards import reward\n\n@reward\ndef stops(record, completion):\n"
    stops += "    os.environ.setdefault('STOPPED', str(os.kill(os.getpid(), signal.SIGTERM)))\n    return 1.0\n"
    own_file.write_text(stops)
    words = [*words, *settings, f"rewards=[{{name: stops, file: {own_file}}}]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOPPED", "")
        patch.delenv("STOPPED")
        assert main(stage, words) == 75
        own_file.write_text(stops + "# changed\n")

        assert main(stage, [*words, "--resume"]) == 4
        assert "rewards was [{'name': 'stops'" in capsys.readouterr().err

        own_file.write_text(stops)
        patch.setenv("STOPPED", "yes")
        assert main(stage, [*words, "--resume"]) == 0
    assert registry.resolve("own").reference == "own@v1"
