"""One token of every row through a model of Llama's kind in few operations.

On a CPU a step of a small model is mostly hundreds of small operations. Here each layer takes fewer of them
and calls only the modules with weights, so that adapters and rounded layers on them stay. A model is proved to answer
as transformers runs it before it is run so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from align.models import fused_layers

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""transformers' models whose layers are the same but for biases and norms of queries and keys"""

_ROUNDED = 0.05
"""mean difference of logits, relative to their mean size, that bfloat16 explains: SmolLM2-135M is 0.028 from
transformers, which is itself 0.048 from float32"""

_PROVED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def is_lean(causal: Any) -> bool:
    """Return whether a causal model, as it is set up now, consists of what `lean_logits` computes."""
    family = type(causal).__module__.rpartition(".modeling_")[2]
    name = _FAMILIES.get(family)
    if name is None or causal.device.type != "cpu" or type(causal).__name__ != f"{name}ForCausalLM":
        return False
    kinds = {f"{name}{part}" for part in ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")}
    return all(type(module).__name__ in kinds and _is_untouched(module) for module in _bypassed(causal))


def _bypassed(causal: Any) -> Iterator[Any]:
    """Yield the modules whose own forward pass is not called."""
    yield from (causal, causal.model, causal.model.norm)
    for layer in causal.model.layers:
        yield from (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)


def _is_untouched(module: Any) -> bool:
    own = vars(module).get("forward")
    # What the fast path puts there computes the same.
    replaced = own is not None and own.__module__ != fused_layers.__name__
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not (replaced or hooked) and not (module.training and getattr(module, "attention_dropout", 0))


def can_step(causal: Any, cache: Any) -> bool:
    """Return whether a step over this cache can be computed here: keys and values of all tokens, and no autocast."""
    from align.models.roomy_cache import RoomyLayer

    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return len(cache.layers) == len(causal.model.layers) and all(type(one) is RoomyLayer for one in cache.layers)


def lean_logits(causal: Any, cache: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the logits (B, V) after one more token (B,) of every row; the mask (B, T) includes it."""
    model = causal.model
    hidden = model.embed_tokens(tokens[:, None])
    positions = mask.sum(dim=-1, keepdim=True) - 1
    cos, sin = (part[:, :, None] for part in model.rotary_emb(hidden, position_ids=positions))
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    visible = None if bool(mask.all()) else mask.bool()[:, None, None]
    for layer, held in zip(model.layers, cache.layers, strict=True):
        hidden += _attend(layer.self_attn, held, _norm(layer.input_layernorm, hidden), (cos, sin), visible)
        inner = _norm(layer.post_attention_layernorm, hidden)
        mlp = layer.mlp
        hidden += mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)).mul_(mlp.up_proj(inner)))
    logits: Tensor = causal.lm_head(_norm(model.norm, hidden))
    return logits[:, -1]


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    # The same in fewer operations than torch 2.13 takes on a CPU.
    length = vector_norm(x, dim=-1, keepdim=True).mul_(x.shape[-1] ** -0.5)
    return (x / torch.hypot(length, _root(module.variance_epsilon))).mul_(module.weight)


@cache
def _root(number: float) -> Tensor:
    return torch.tensor(math.sqrt(number))


def _attend(attention: Any, held: Any, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
    """Return what attention adds to one position of every row (B, 1, H)."""
    rows, size = len(x), attention.head_dim
    queries, keys, values = (
        project(x).view(rows, 1, -1, size) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        queries, keys = _norm(attention.q_norm, queries), _norm(attention.k_norm, keys)
    together = _rotate(torch.cat([queries, keys], dim=2), *rotation)
    queries, keys = together.split_with_sizes([queries.shape[2], keys.shape[2]], dim=2)
    all_keys, all_values = held.update(keys.transpose(1, 2), values.transpose(1, 2))
    # The queries that share a head of keys are rows of one product, so that nothing is repeated.
    grouped = queries.reshape(rows, all_keys.shape[1], -1, size)
    mixed = scaled_dot_product_attention(grouped, all_keys, all_values, attn_mask=visible, scale=attention.scaling)
    out: Tensor = attention.o_proj(mixed.reshape(rows, 1, -1))
    return out


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def prove_lean(causal: Any, stock: Callable[[bool], Tensor]) -> bool:
    """Return whether a model answers here as it does in transformers; found once, with a line where it does not.

    `stock` gives the logits of one step after a short prompt, given whether it is computed here.
    """
    if causal not in _PROVED:
        was_training = causal.training
        causal.eval()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            lean, expected = stock(True), stock(False)
        causal.train(was_training)
        _PROVED[causal] = _agree(causal, lean, expected)
        if not _PROVED[causal]:
            change = float((lean - expected).abs().max())
            sys.stderr.write(f"{type(causal).__name__}: decoded by transformers' layers, ours differ by {change:.1e}\n")
    return _PROVED[causal]


def _agree(causal: Any, lean: Tensor, expected: Tensor) -> bool:
    from align.models.probes import logits_differ
    from align.models.rounded_linear import RoundedLinear

    if causal.dtype == torch.bfloat16:  # over many layers it moves single logits by more than any bound would allow
        return bool((lean - expected).abs().mean() <= _ROUNDED * expected.abs().mean())
    # Rounded inputs turn differences of the last bit into those of a step.
    coarse = any(isinstance(module, RoundedLinear) for module in causal.modules())
    return not logits_differ(lean, expected, torch.bfloat16 if coarse else causal.dtype)
