"""GRPO whose completions come from vLLM: TRL's own code around a stand-in that takes and gives what vLLM does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from align import grpo
from align.config import build
from align.data import load_records
from align.data.rendering.chat_template import stop_token_ids
from align.data.rendering.render_view import render_view
from align.grpo import GrpoConfig
from align.training.command import run_stage


class StandIn:
    """The engine of one process: a plain model that reads token ids and lets its weights be replaced."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, model, **options):
        from transformers import AutoModelForCausalLM

        self.options, self.asked, self.loaded = options, [], set()
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        runner = SimpleNamespace(model=self)
        driver = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=driver),
            model_config=SimpleNamespace(max_model_len=options["max_model_len"]),
        )
        self.made.append(self)

    def load_weights(self, weights):
        state = self.model.state_dict()
        for name, value in weights:
            state[name].copy_(value)
            self.loaded.add(name)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked += [(tuple(prompt["prompt_token_ids"]), vars(sampling_params)) for prompt in prompts]
        return [self._complete(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _complete(self, prompt, params):
        ids, found = list(prompt), []
        while len(found) < params.max_tokens and (not found or ids[-1] not in params.stop_token_ids):
            with torch.no_grad():
                logprobs = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial(logprobs.exp(), 1)))
            found.append({ids[-1]: SimpleNamespace(rank=1, logprob=float(logprobs[ids[-1]]))})
        answer = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=found)
        return SimpleNamespace(prompt_token_ids=list(prompt), outputs=[answer])


@pytest.fixture
def vllm(monkeypatch):
    """As on a machine that has vLLM and a GPU; what TRL writes into the environment for it is taken back."""
    from trl.generation import vllm_generation

    monkeypatch.setattr(grpo, "check_vllm", lambda *_: None)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", StandIn, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
    StandIn.made.clear()
    return StandIn.made


def test_vllm_gets_our_tokens_our_stops_and_the_weights_of_the_policy(vllm, registry, tiny_base, tmp_path, no_pictures):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} and {n}?", "answer": str(2 * n)}) + "\n" for n in range(6)))
    settings = {
        "model": str(tiny_base), "data": str(data), "name": "fast", "bf16": False, "max_length": 64, "max_steps": 2,
        "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5, "logging_steps": 1,
        "learning_rate": 1e-2, "beta": 0.1, "vllm": {"mode": "colocate"}, "warmup_ratio": 0.0,
        "rewards": [{"name": "keyword", "args": {"scores": {"e": 1, "a": -1}}}],
    }  # fmt: skip

    made = run_stage(grpo.STAGE, build(GrpoConfig, settings), registry)

    from transformers import AutoTokenizer

    (engine,) = vllm
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ours = {tuple(row["prompt_ids"]) for row in render_view("prompt", load_records(str(data), view="prompt").records,
                                                              tokenizer, 59).rows}  # fmt: skip
    assert {prompt for prompt, _ in engine.asked} <= ours
    assert len(engine.asked) == 2 * 4
    assert all(asked["stop_token_ids"] == stop_token_ids(tokenizer) for _, asked in engine.asked)
    assert all(asked["max_tokens"] == 5 for _, asked in engine.asked)
    assert engine.options["max_model_len"] == 64
    # Merged for the engine, the policy's weights have the names of the plain model, and every one of them came.
    assert engine.loaded == {name for name, _ in engine.model.named_parameters()}
    rows = [json.loads(line) for line in (Path(made.location) / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert rows[1]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
