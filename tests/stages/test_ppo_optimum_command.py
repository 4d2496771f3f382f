"""PPO from the command line against the policy that is known to be best: ref(y) exp(r(y) / kl_coef) / Z.

A base of sixteen tokens is registered, five prompts are asked, an answer is one token; what is compared is what a user
loads afterwards with plain PEFT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from align.registry import open_registry
from align.registry.fingerprints import base_digests

SPECIAL = ["<pad>", "<end>", "<user>", "<bot>"]
WORDS = ["yes", "no", "maybe", "never", "always", "often", "w1", "w10", "red", "blue", "one", "two"]
SCORES = {"yes": 1.0, "no": -1.0, "maybe": 0.5, "never": -0.5, "always": 0.8, "w1": -0.3, "w10": 0.9, "red": 0.4}
PROMPTS = ["red or blue", "one two", "never", "is it w1", "always yes no"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
SETTINGS = """
model: tiny
data: {data}
name: tuned
rewards:
  - name: keyword
    args:
      scores: {scores}
kl_coef: 1.0
max_length: 16
sampling: {{max_new_tokens: 1, missing_eos_penalty: 0.0}}
rollout_batch_size: 320
per_device_train_batch_size: 160
max_steps: 40
learning_rate: 3.0e-3
bf16: false
save_steps: 0
"""


@pytest.fixture
def registered(tmp_path) -> Path:
    """A registry with a base whose answers differ from prompt to prompt and are far from uniform."""
    words = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", additional_special_tokens=["<user>", "<bot>"],
        chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(3)
    shape = Qwen3Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, initializer_range=0.15, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    registry = open_registry(tmp_path / "registry")
    with registry.stage("tiny") as staging:
        Qwen3ForCausalLM(shape).save_pretrained(staging.path)
        tokenizer.save_pretrained(staging.path)
        base = {"reference": None, "location": None, "digests": base_digests(staging.path)}
        facts = {"parents": [], "template_digest": None, "data": [], "metrics": {}, "versions": {}}
        staging.commit({"stage": "pretrain", "kind": "base", "base": base} | facts)
    return registry.root


def distributions(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What base and tuned policy answer to each prompt, (P, V) each, loaded as anybody would."""
    from peft import PeftModel

    registry = open_registry(root)
    base = AutoModelForCausalLM.from_pretrained(registry.resolve("tiny").location)
    tokenizer = AutoTokenizer.from_pretrained(registry.resolve("tiny").location)
    policy = PeftModel.from_pretrained(base, registry.resolve("tuned").location).eval()
    found = []
    for prompt in PROMPTS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            tuned = policy(**asked).logits[0, -1].softmax(-1)
            with policy.disable_adapter():
                found.append((policy(**asked).logits[0, -1].softmax(-1), tuned))
    return torch.stack([ref for ref, _ in found]), torch.stack([tuned for _, tuned in found])


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", [0.5, 1.0])
def test_ppo_from_the_command_line_ends_at_the_best_policy(registered, tmp_path, kl_coef):
    data, settings = tmp_path / "prompts.jsonl", tmp_path / "ppo.yaml"
    data.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": one}]}) + "\n" for one in PROMPTS))
    settings.write_text(SETTINGS.format(data=data, scores=json.dumps(SCORES)))

    done = subprocess.run(
        [sys.executable, "-m", "align.ppo", settings, f"kl_coef={kl_coef}", "--registry", registered],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "registered tuned@v1" in done.stdout
    ref, policy = distributions(registered)
    scores = torch.tensor([0.0] * len(SPECIAL) + [SCORES.get(word, 0.0) for word in WORDS])
    optimum = (ref.log() + scores / kl_coef).softmax(-1)

    def variation(one, other):
        return 0.5 * (one - other).abs().sum(-1).mean().item()

    assert variation(ref, optimum) > 0.15
    assert variation(policy, optimum) < 0.05
