"""DPO against the one case whose answer is known: answers few enough to write down, preferred as Bradley and Terry say.

On pairs of the Bradley-Terry model of r, the optimum is ref(y) exp(r(y) / beta) / Z (Rafailov et al. 2023, eq. 4).
"""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from test_ppo_optimum import WORDS, twelve_tokens  # noqa: F401

from align.config import build
from align.dpo import STAGE, DpoConfig, dpo
from align.training.run import open_run

BETA, PAIRS = 0.8, 9000
PROMPTS = ["a b", "c d e", "h"]


def scores_of(prompt: str) -> dict[str, float]:
    """A table of rewards for each prompt, from -1 to 1, in another order for each."""
    order = random.Random(prompt).sample(WORDS, len(WORDS))
    return {word: 2 * place / (len(WORDS) - 1) - 1 for place, word in enumerate(order)}


def pairs(seed: int):
    """Pairs of different answers, drawn evenly; the first is chosen with probability sigmoid(r1 - r2)."""
    rng = random.Random(seed)
    for _ in range(PAIRS):
        for prompt in PROMPTS:
            one, other = rng.sample(WORDS, 2)
            scores = scores_of(prompt)
            wins = rng.random() < 1 / (1 + math.exp(scores[other] - scores[one]))
            chosen, rejected = (one, other) if wins else (other, one)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def answers(model, tokenizer, prompt: str) -> torch.Tensor:
    """The distribution (8,) over the eight answers, each a word and its end, as the model gives it for a prompt."""
    start = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    rows = torch.tensor([[*start, tokenizer.convert_tokens_to_ids(word), 1] for word in WORDS])
    with torch.no_grad():
        logps = model.eval()(input_ids=rows).logits[:, len(start) - 1 : -1].log_softmax(-1)
    return logps.gather(2, rows[:, len(start) :, None]).sum((1, 2)).softmax(0)


@pytest.mark.slow
def test_dpo_converges_to_the_closed_form_optimum(registry, twelve_tokens, tmp_path):  # noqa: F811
    base, _ = twelve_tokens
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs(seed=0)))
    config = build(DpoConfig, {
        "model": str(base), "data": str(data), "name": "tuned", "bf16": False, "beta": BETA, "learning_rate": 1e-2,
        "per_device_train_batch_size": 256, "num_train_epochs": 2, "fast_path": False, "max_length": 16,
        "save_steps": 0, "logging_steps": 50,
    })  # fmt: skip

    # Thousands of answers to one prompt of five tokens are not what the fast path is for; it gives the same.
    with open_run(STAGE, config, registry, resume=False) as run:
        trained = dpo(config, run)

    def variation(one, other):
        return 0.5 * (one - other).abs().sum().item()

    before, after = [], []
    for prompt in PROMPTS:
        policy = answers(trained.model, trained.tokenizer, prompt)
        with trained.model.disable_adapter():
            ref = answers(trained.model, trained.tokenizer, prompt)
        rewards = torch.tensor([scores_of(prompt)[word] for word in WORDS])
        optimum = (ref.log() + rewards / BETA).softmax(0)
        before.append(variation(ref, optimum))
        after.append(variation(policy, optimum))
    assert sum(before) / len(before) > 0.3
    assert sum(after) / len(after) < 0.05
