"""The whole way on a real pretrained model of 135 million parameters, which a Python package carries as a GGUF file."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aftermath import CLOCKS

from align.registry import open_registry
from align.world.write import write_world

pytestmark = pytest.mark.slow
SETTINGS = {
    "max_length": 256, "per_device_train_batch_size": 4, "lora.r": 8, "bf16": "false", "logging_steps": 1,
    "save_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(smollm2_registry) -> Path:
    """A registry with SmolLM2 and the data of the small world."""
    write_world(smollm2_registry / "world", 0)
    return smollm2_registry


@pytest.fixture(scope="module")
def sft(root, warm) -> Path:
    """The same registry, with an adapter trained on 48 demonstrations of the world's answers."""
    words = _words(root, "world-demonstrations:limit=200", "smol-sft", "smollm2", max_steps=12, learning_rate=1e-3)
    ended = warm.run("sft", words)
    assert ended.code == 0, ended.err
    return root


def align(root: Path, *words: object) -> str:
    """Run a command and return what it printed."""
    command = [sys.executable, "-m", "align", *map(str, words), "--registry", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _words(root: Path, data: str, name: str, model: str, **more: object) -> list[str]:
    given = {"data": data, "name": name, "model": model} | SETTINGS | more
    return ["--registry", str(root), *(f"{key}={value}" for key, value in given.items())]


def _log(root: Path, name: str) -> list[dict[str, float]]:
    """The log of a registered version, without what a clock has measured."""
    lines = Path(open_registry(root).resolve(name).location, "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith(CLOCKS)} for line in lines]


def _evaluate(root: Path, *words: object) -> list[dict]:
    out = root / "evaluation.json"
    align(root, "evaluate", *words, "--no_record", "--json", out)
    return json.loads(out.read_text())["models"]


def test_the_base_that_was_added_answers_sensibly(root):
    assert "Paris" in align(root, "generate", "smollm2", "What is the capital of France?", "--temperature", "0")


def test_sft_lowers_held_out_loss_and_raises_the_judged_score(sft):
    before, after = _evaluate(
        sft, "smollm2", "smol-sft", "--data", "world-prompts-eval:limit=24", "--scorer", "world",
        "--max_new_tokens", 24, "--no_kl",
    )  # fmt: skip
    assert after["comparison"]["gold"]["low"] > 0, (before["metrics"]["gold"], after["metrics"]["gold"])

    before, after = _evaluate(
        sft, "smollm2", "smol-sft", "--data", "world-demonstrations:seed=7,limit=16", "--no_kl", "--max_new_tokens", 1
    )
    assert after["comparison"]["perplexity"]["high"] < 0, (before["metrics"]["perplexity"], after["metrics"])


def test_bf16_takes_the_fast_path(root, warm):
    words = _words(root, "world-demonstrations:limit=40", "half", "smollm2", max_steps=1, warmup_ratio=0, bf16="true")

    ended = warm.run("sft", words)

    assert ended.code == 0, ended.err
    assert "stock path" not in ended.out


def test_dpo_starts_at_ln_2(sft, warm):
    ended = warm.run(
        "dpo", _words(sft, "world-preferences:limit=8", "smol-dpo", "smol-sft", max_steps=1, warmup_ratio=0)
    )

    assert ended.code == 0, ended.err
    assert _log(sft, "smol-dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_ppo_starts_at_its_reference(sft, warm):
    words = _words(sft, "world-prompts:limit=4", "smol-ppo", "smol-sft", max_steps=1, rollout_batch_size=4)

    ended = warm.run("ppo", [*words, "rewards=[{name: small_world}]", "sampling.max_new_tokens=12", "num_ppo_epochs=1"])

    assert ended.code == 0, ended.err
    assert _log(sft, "smol-ppo")[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_a_killed_run_resumes_to_the_same_bits(root, warm):
    changed = {"max_steps": 6, "save_steps": 2, "lora.dropout": 0.1, "per_device_train_batch_size": 2}
    straight, killed = (
        _words(root, "world-demonstrations:limit=40", name, "smollm2", **changed) for name in ("whole", "killed")
    )
    assert warm.run("sft", straight).code == 0
    assert warm.run("sft", killed, signal=signal.SIGKILL, at_step=5).code == -signal.SIGKILL

    ended = warm.run("sft", [*killed, "--resume"])

    assert ended.code == 0, ended.err
    assert "\nresuming from step 4\n" in ended.out
    assert _log(root, "killed") == _log(root, "whole")
    weights = [
        Path(open_registry(root).resolve(name).location, "adapter_model.safetensors").read_bytes()
        for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]


def test_the_server_and_stock_transformers_on_the_merged_model_write_the_same(sft, tmp_path):
    from openai import OpenAI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    question = [{"role": "user", "content": "How much is the price of the kettle?"}]
    align(sft, "registry", "merge", "smol-sft", "--out", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]

    with _serving(sft, "smollm2", "smol-sft") as url:
        client = OpenAI(base_url=url, api_key="none")
        asked = {"messages": question, "temperature": 0, "max_tokens": 16}
        base, tuned = (
            client.chat.completions.create(model=name, **asked).choices[0].message.content
            for name in ("smollm2", "smol-sft")
        )
        streamed = client.chat.completions.create(model="smol-sft", stream=True, **asked)
        assert "".join(piece.choices[0].delta.content or "" for piece in streamed if piece.choices) == tuned

    assert tuned == tokenizer.decode(written, skip_special_tokens=True)
    assert tuned != base


@contextmanager
def _serving(root: Path, *models: str) -> Iterator[str]:
    """Serve models from a process of its own; give the address of its API."""
    command = [sys.executable, "-m", "align", "serve", *models, "--port", "0", "--registry", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = [process.stdout.readline()]
            while "ready" not in said[-1]:
                said.append(process.stdout.readline())
                assert said[-1], said
            yield "".join(said).split("listening at ")[1].partition(";")[0] + "/v1"
        finally:
            process.terminate()
            process.communicate()
