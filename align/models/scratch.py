"""Small models from nothing: a tokenizer trained on the corpus and a decoder built from a preset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from align.errors import UsageError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD = "<|pad|>"
END = "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

LONGEST_TOKEN = 9
"""bytes: three Chinese characters, or a space and eight letters; Chinese has no spaces, so a small corpus would else
give tokens of whole phrases, from which a small model learns nothing about their parts"""

# One control token a role and one end token: a turn costs two tokens beyond its content.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{%- else -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


class Preset(NamedTuple):
    """The dimensions of a small Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


PRESETS = {
    "tiny": Preset(32, 64, 2, 2),
    "nano": Preset(160, 480, 2, 5),
    "micro": Preset(256, 768, 4, 8),
    "mini": Preset(384, 1024, 8, 6),
}
"""`tiny` is for tests; with 768 tokens nano has 0.8 million parameters, micro 3.6 and mini 14.5; few and wide layers
learn most a second on a CPU"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with the control tokens and chat template of a small base.

    No byte is unknown to it. The end-of-sequence token is the end of a turn, so a base that has seen documents end has
    also learned where an answer ends.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    control = [PAD, END, *ROLE_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(control) + len(alphabet):
        raise UsageError(
            f"vocab_size: {vocab_size} asked; the bytes alone take {len(control) + len(alphabet)}; ask for more"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=control, initial_alphabet=alphabet,
        max_token_length=LONGEST_TOKEN, show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD,
        additional_special_tokens=list(ROLE_TOKENS), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_base(preset: str, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> PreTrainedModel:
    """Build a small decoder with random weights; seed torch first for the same weights twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = find_preset(preset)
    config = LlamaConfig(
        vocab_size=len(tokenizer), **sizes._asdict(), num_key_value_heads=sizes.num_attention_heads,
        max_position_embeddings=max_length, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def find_preset(name: str) -> Preset:
    """Return the preset of that name; UsageError with the nearest ones when there is none."""
    if name not in PRESETS:
        raise UsageError(f"model scratch:{name}; there is no such preset;{nearest(name, PRESETS)}")
    return PRESETS[name]
