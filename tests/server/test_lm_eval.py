"""lm-evaluation-harness asks a server and gets the numbers that its own `hf` model gives of the same files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, running
from tiny import WORDS
from zoo import build_zoo_model

from align.engine.local import LocalEngine
from align.models.adapters import load_models
from align.models.loading import Precision
from align.registry import Registry, open_registry
from align.server.served_models import describe_models, find_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tenacity") is None and "CI" not in os.environ,
        reason='lm-eval cannot ask servers; pip install "align[clients]"',
    ),
]
SCRIPT = Path(__file__).with_name("harness_script.py")
DATA = """\
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
"""
TASKS = {
    "tiny_choice": """\
task: tiny_choice
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "tiny_rolling": """\
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: word_perplexity}]
""",
    "tiny_writing": """\
task: tiny_writing
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "Q:", "zz", "qq", "xx"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}
LIKELY = ["tiny_choice", "tiny_rolling"]


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"the {word} fox 狐狸 jumps {'over ' * place}", "choices": ["nine eggs", "👍 dog", "there"],
         "answer": place % 3}
        for place, word in enumerate(WORDS[:6])
    ]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task + DATA % data)
    return folder


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer puts <s> in front of every text."""
    return build_zoo_model("llama", tmp_path_factory.mktemp("bos"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def servers(engine: LocalEngine, models: Registry, with_bos: Path, tmp_path_factory) -> Iterator[dict[str, Running]]:
    other = open_registry(tmp_path_factory.mktemp("other"))
    second = LocalEngine(load_models(other, [str(with_bos)], Precision()))
    try:
        with (
            running(engine, describe_models(models, find_models(models, ["stone", "warm-sft"]))) as stone,
            running(second, describe_models(other, find_models(other, [str(with_bos)]))) as bos,
        ):
            yield {"stone": stone, "bos": bos}
    finally:
        second.close()


def run(task_files: Path, runs: list[Any]) -> list[dict[str, Any]]:
    """What each run was answered."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(task_files), json.dumps(runs)],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "x"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def flat(answers: dict[str, Any]) -> list[Any]:
    """Every number, text and truth value in order."""
    if isinstance(answers, dict):
        return [each for value in answers.values() for each in flat(value)]
    return [each for value in answers for each in flat(value)] if isinstance(answers, list) else [answers]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    mine, theirs = flat(found), flat(expected)
    assert len(mine) == len(theirs) > 10
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(other, float):
            assert one == pytest.approx(other, abs=2e-3, rel=1e-5)
        else:
            assert one == other


def hf(folder: str, **more: Any) -> dict[str, Any]:
    return {"pretrained": folder, "dtype": "float32", **more}


def asked(server: Running, model: str, folder: str, path: str = "completions", **more: Any) -> dict[str, Any]:
    return {"model": model, "base_url": f"{server.url}/v1/{path}", "tokenizer": folder, "max_retries": 1} | more


def test_log_likelihoods_and_texts_are_those_of_the_harness_itself(servers, models, task_files):
    folder, server = models.resolve("stone").location, servers["stone"]
    tasks, local = list(TASKS), "local-completions"
    plain = asked(server, "stone", folder, tokenizer_backend="huggingface")

    expected, adapted, *found = run(task_files, [
        ("hf", hf(folder), tasks, False),
        ("hf", hf(folder, peft=models.resolve("warm-sft").location), tasks, False),
        (local, plain | {"model": "warm-sft"}, tasks, False),
        (local, plain, tasks, False),
        (local, plain | {"tokenized_requests": False}, tasks, False),
        (local, plain | {"batch_size": 4}, tasks, False),
        (local, plain | {"tokenized_requests": False, "batch_size": 4}, tasks, False),
        (local, plain | {"num_concurrent": 3}, tasks, False),
        (local, plain | {"tokenizer_backend": "auto"}, LIKELY, False),
    ])  # fmt: skip

    same(found[0], adapted)
    for each in found[1:-1]:
        same(each, expected)
    same(found[-1], {task: expected[task] for task in LIKELY})
    assert flat(adapted) != flat(expected)


def test_a_tokenizer_that_begins_with_a_token_of_its_own_gives_the_same_numbers(servers, with_bos, task_files):
    folder, server = str(with_bos), servers["bos"]
    plain = asked(server, with_bos.name, folder, tokenizer_backend="huggingface")

    expected, with_it, *found = run(task_files, [
        ("hf", hf(folder, add_bos_token=False), LIKELY, False),
        ("hf", hf(folder, add_bos_token=True), LIKELY, False),
        ("local-completions", plain, LIKELY, False),
        ("local-completions", plain | {"add_bos_token": True}, LIKELY, False),
        ("local-completions", plain | {"add_bos_token": True, "tokenized_requests": False}, LIKELY, False),
    ])  # fmt: skip

    same(found[0], expected)
    same(found[1], with_it)
    same(found[2], with_it)


def test_conversations_are_answered_as_the_harness_itself_answers_them(servers, models, task_files):
    folder, server = models.resolve("stone").location, servers["stone"]
    chat = asked(server, "stone", folder, "chat/completions")
    del chat["tokenizer"]

    expected, found, several = run(task_files, [
        ("hf", hf(folder), ["tiny_writing"], True),
        ("local-chat-completions", chat, ["tiny_writing"], True),
        ("local-chat-completions", chat | {"num_concurrent": 4}, ["tiny_writing"], True),
    ])  # fmt: skip

    # The harness sends four stop texts to a chat at most and cuts at the others itself.
    assert flat(found) == flat(several) == flat(expected)
