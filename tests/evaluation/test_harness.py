"""Benchmarks through lm-evaluation-harness: what is refused before anything heavy, and numbers equal to its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import UsageError
from align.evaluation.harness import Benchmarks, read_results

ROOT = Path(__file__).resolve().parents[2]
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list:
  - {metric: word_perplexity, higher_is_better: false}
"""


@pytest.fixture(scope="module")
def task_files(tmp_path_factory) -> Path:
    """Two tasks of ten rows, without anything from outside."""
    folder = tmp_path_factory.mktemp("tasks")
    words = "quick brown lazy blue nine far here there eggs dog".split()
    rows = [
        {"question": f"the {word} fox jumps over", "choices": ["nine eggs", "a lazy dog", "there"], "answer": place % 3}
        for place, word in enumerate(words)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE % data)
    (folder / "rolling.yaml").write_text(ROLLING % data)
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "--harness: no task is named"),
        ({"include_path": "/no/such/folder"}, "--include_path /no/such/folder: no such folder"),
        ({"batch_size": "0"}, "--batch_size 0: neither a number above 0 nor auto"),
        ({"batch_size": "many"}, "--batch_size many"),
        ({"num_fewshot": -1}, "--num_fewshot -1: give 0 or more"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(settings, message):
    with pytest.raises(UsageError, match=message):
        Benchmarks(**{"tasks": ("tiny_choice",), **settings}).check()


def test_every_number_has_its_interval_and_its_direction():
    results = {
        "results": {
            "a": {"alias": "a", "sample_len": 50, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25},
            "b": {"perplexity,none": 12.0, "perplexity_stderr,none": "N/A"},
        },
        "n-samples": {"a": {"original": 100, "effective": 50}},
        "higher_is_better": {"a": {"acc": True, "f1": None}, "b": {"perplexity": False}},
    }

    found = read_results(results)

    assert list(found) == ["a acc", "a f1 strict", "b perplexity"]
    assert (found["a acc"].value, found["a acc"].n, found["a acc"].better) == (0.5, 50, "higher")
    assert found["a acc"].high - found["a acc"].low == pytest.approx(2 * 1.96 * 0.1, rel=1e-4)
    assert math.isnan(found["a f1 strict"].low)
    assert (found["a f1 strict"].better, found["b perplexity"].better) == (None, "lower")


COMPARE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from align.evaluation.harness import Benchmarks, record_harness_scores, run_harness
from align.registry import evaluations, open_registry

registry, tasks, base = open_registry(sys.argv[1]), sys.argv[2], sys.argv[3]
names = ("tiny_choice", "tiny_rolling")
ours = run_harness(registry, ["tiny", base], Benchmarks(names, tasks))
record_harness_scores(registry, ours)
theirs = []
for arguments in (f"pretrained={base},peft={ours[0].checkpoint.location}", f"pretrained={base}"):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = lm_eval.simple_evaluate("hf", arguments, tasks=list(names), device="cpu", task_manager=manager)
    found = found["results"]
    theirs.append([found["tiny_choice"]["acc,none"], found["tiny_rolling"]["word_perplexity,none"]])
kept = evaluations.read_records(registry.resolve("tiny"))
numbers = [[number.value for number in each.numbers.values()] for each in ours]
print(json.dumps({"ours": numbers, "theirs": theirs, "kept": kept[0]["metrics"]}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base) -> Path:
    """A registry with one adapter that has moved far from its base."""
    from align.config import build
    from align.registry import open_registry
    from align.sft import STAGE
    from align.training.command import run_stage

    folder = tmp_path_factory.mktemp("harness")
    rows = [{"prompt": f"the fox number {n}", "completion": "nine blue eggs"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(tiny_base), "data": str(folder / "rows.jsonl"), "name": "tiny", "max_steps": 6}
    run_stage(STAGE, build(STAGE.config, settings | {"learning_rate": 0.05}), open_registry(folder / "registry"))
    return folder / "registry"


@pytest.mark.slow
def test_the_numbers_are_those_of_the_harness_called_directly(trained, task_files, tiny_base):
    done = _python("-c", COMPARE, str(trained), str(task_files), str(tiny_base))

    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] == found["theirs"]
    assert found["ours"][0] != found["ours"][1]
    assert found["kept"]["tiny_rolling word_perplexity"]["value"] == found["ours"][0][1]


@pytest.mark.slow
def test_the_command_line_runs_tasks_and_tells_what_it_cannot(trained, task_files, tiny_base):
    asked = ["-m", "align.evaluate", "tiny", "--registry", str(trained), "--include_path", str(task_files)]

    done = _python(*asked, "--harness", "tiny_*", "--limit", "4", "--json", str(trained.parent / "out.json"))
    unknown = _python(*asked, "--harness", "tiny_chioce")

    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice acc" in done.stdout
    assert "recorded beside tiny@v1" in done.stdout
    assert "tiny_rolling word_perplexity" in (trained.parent / "out.json").read_text()
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "--harness tiny_chioce: lm-eval has no task of that name; did you mean tiny_choice" in unknown.stderr


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
