"""PPO against the one case whose answer is known: a response space small enough to write down.

The policy that maximises E[r] - kl_coef * KL(policy || ref) is ref(y) exp(r(y) / kl_coef) / Z (Ziegler et al. 2019).
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from align.config import build
from align.ppo import STAGE, PpoConfig, ppo
from align.rewards import reward
from align.training.run import open_run

SPECIAL = ["<pad>", "<end>", "<user>", "<bot>"]
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
SCORES = {"a": 1.0, "b": 0.5, "c": -0.5, "d": 1.0, "e": 0.0, "f": 0.8, "g": -1.0, "h": 0.0}
KL_COEF = 0.5


@pytest.fixture
def twelve_tokens(tmp_path):
    """A base whose completions of one token are twelve in all, with a reference far from uniform."""
    words = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", additional_special_tokens=["<user>", "<bot>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<bot> {% endif %}"
    )
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=12, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, initializer_range=0.15, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = tmp_path / "prompt.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "a b"}]}) + "\n")
    return tmp_path / "base", data


def test_ppo_approaches_the_closed_form_optimum(registry, twelve_tokens):
    @reward
    def table_in_this_test(record, completion):
        return SCORES.get(completion.strip(), 0.0)

    base, data = twelve_tokens
    config = build(PpoConfig, {
        "model": str(base), "data": str(data), "name": "tuned", "bf16": False, "max_steps": 40, "kl_coef": KL_COEF,
        "learning_rate": 3e-3, "rollout_batch_size": 256, "per_device_train_batch_size": 128, "max_length": 16,
        "sampling": {"max_new_tokens": 1, "missing_eos_penalty": 0.0}, "rewards": [{"name": "table_in_this_test"}],
        "save_steps": 0,
    })  # fmt: skip

    with open_run(STAGE, config, registry, resume=False) as run:
        trained = ppo(config, run)

    prompt = torch.tensor([[2, 4, 5, 1, 3]])
    with torch.no_grad():
        policy = trained.model(input_ids=prompt).logits[0, -1].softmax(-1)
        with trained.model.disable_adapter():
            ref = trained.model(input_ids=prompt).logits[0, -1].softmax(-1)
    scores = torch.tensor([0.0] * len(SPECIAL) + [SCORES[word] for word in WORDS])
    optimum = (ref.log() + scores / KL_COEF).softmax(-1)

    def variation(one, other):
        return 0.5 * (one - other).abs().sum().item()

    assert variation(ref, optimum) > 0.3
    assert variation(policy, optimum) < 0.05
