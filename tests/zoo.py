"""Tiny real models of the architectures in use, each with a tokenizer as its family has; nothing is downloaded.

Every one has a peculiarity that a stage has to survive, named in its comment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import CHATML, WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

POSITIONS = 128
VOCABULARY = 320

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Grouped heads, untied head, <s> in front of every text, no pad token.
    "llama": _GROUPED | {"tie_word_embeddings": False},
    # Biases in the attention.
    "qwen2": _GROUPED | {"tie_word_embeddings": True},
    "qwen3": _GROUPED | {"head_dim": 8, "tie_word_embeddings": True},
    # Soft-capped logits and attention, alternating sliding window, a template that refuses a system turn.
    "gemma2": _GROUPED
    | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": _GROUPED
    | {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    # A sliding window shorter than a row, no pad token.
    "mistral": _GROUPED | {"head_dim": 8, "sliding_window": 16},
    # A head with a bias, part of each head rotated, embeddings padded above the tokenizer, pad is EOS, no template.
    "phi": _SIZES | {"vocab_size": VOCABULARY + 16, "tie_word_embeddings": False},
    # Query, key and value in one module, gate and up in another.
    "phi3": _GROUPED,
    # Conv1D instead of Linear, learned positions under another name, dropout, pad is EOS, no template.
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": POSITIONS,
    },
    # Query, key and value in one module, embeddings padded above the tokenizer, pad is EOS, no template.
    "gpt_neox": _SIZES | {"vocab_size": VOCABULARY + 16},
    # Learned positions behind an offset of two, a projection around smaller embeddings, rows and positions flattened.
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": 16,
    },
    # Experts in fused parameters, a loss of the router beside that of the tokens.
    "mixtral": _GROUPED | _EXPERTS | {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": _GROUPED
    | _EXPERTS
    | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "tie_word_embeddings": True},
}

_LINEAR_ATTENTION = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_STATE_SPACE = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}

# Models whose layers carry a state: their convolutions, gates and time mixing are parameters of three dimensions too.
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": _GROUPED | {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": _GROUPED | _LINEAR_ATTENTION,
    "falcon_h1": _GROUPED | _MAMBA | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "bamba": _GROUPED | _MAMBA | {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "recurrent_gemma": _SIZES
    | {
        "head_dim": 8,
        "lru_width": 32,
        "num_key_value_heads": 1,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "context_length": POSITIONS,
    },
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": _STATE_SPACE,
    "zamba2": _GROUPED
    | {
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
    "nemotron_h": _GROUPED
    | {
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
}
_FOUR_OF_TWO = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Hybrid or not, these hold experts in fused parameters.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": _GROUPED | _FOUR_OF_TWO,
    "qwen3_moe": ARCHITECTURES["qwen3_moe"] | {"mlp_only_layers": [0]},
    "qwen2_moe": _GROUPED
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_next": _GROUPED
    | _LINEAR_ATTENTION
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "jamba": _GROUPED
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "granitemoe": _GROUPED | _FOUR_OF_TWO,
    "granitemoehybrid": _GROUPED
    | _FOUR_OF_TWO
    | _MAMBA
    | {
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    },
    "lfm2_moe": _GROUPED
    | {
        "layer_types": ["conv", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
    "llama4_text": _GROUPED | {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
    "phimoe": _GROUPED | _FOUR_OF_TWO,
    "jetmoe": _GROUPED | _FOUR_OF_TWO | {"kv_channels": 8},
}

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token }}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

_END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_CHATML = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": GEMMA}

_TOKENIZERS: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": _END_OF_TEXT,
    "gpt2": _END_OF_TEXT,
    "gpt_neox": _END_OF_TEXT,
    "opt": {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
}
_TURNS = {"gemma2": ["<start_of_turn>", "<end_of_turn>"], "gemma3_text": ["<start_of_turn>", "<end_of_turn>"]}


def zoo_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens with the special tokens and template of the family."""
    named = dict(_TOKENIZERS.get(architecture, _CHATML))
    template = named.pop("chat_template", None)
    control = [*dict.fromkeys(named.values()), *_TURNS.get(architecture, [])]
    control += ["<|im_start|>"] if template is CHATML else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    if named.get("bos_token") not in (None, named["eos_token"]):
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=control, **named)
    fast.chat_template = template
    return fast


def build_zoo_model(architecture: str, folder: Path, **changes: Any) -> Path:
    """Write a two-layer model of any architecture above, under 100k parameters unless changed, and its tokenizer."""
    tokenizer = zoo_tokenizer(architecture)
    set_seed(0)
    config = AutoConfig.for_model(
        architecture,
        **(EXPERTS | HYBRIDS | ARCHITECTURES)[architecture] | changes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score_last_token(hidden, attention_mask, head):
    """Scores (B,) read at each row's last attended token; hidden (B, T, H), attention_mask (B, T)."""
    import torch

    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * positions).argmax(dim=1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return head(hidden[rows, last].to(head.weight.dtype)).squeeze(-1)
