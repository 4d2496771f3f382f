"""PiSSA and OLoRA as plain LoRA of twice the rank, so that the base they share with others stays as it is.

Both take s B0 A0 out of the base W when they start and train B A in its place. What they compute is
W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: the same sum over a base that nothing was taken out of. A0 and B0 are what
PEFT computes from W, here on a copy of one layer at a time.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError
from align.models.adapter_kinds import CONVERTED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import LoraConfig
    from torch import Tensor

    from align.registry import Checkpoint


def is_converted(config: LoraConfig) -> bool:
    """Whether an adapter's start took a part out of its base."""
    return config.init_lora_weights in CONVERTED


def plain_config(config: LoraConfig) -> LoraConfig:
    """The configuration of the converted adapter: twice the rank, the same scale."""
    factor = 2**0.5 if config.use_rslora else 2
    plain = copy(config)
    plain.init_lora_weights = True
    plain.r, plain.lora_alpha = 2 * config.r, factor * config.lora_alpha
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    return plain


def plain_state(
    model: Any, name: str, config: LoraConfig, state: dict[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """The tensors of the converted adapter `name` of a model, from those in the file; `config` is the file's.

    Raises IntegrityError when the start cannot be computed from a layer of this base.
    """
    import torch

    whole = dict(state)
    for path, layer in _layers(model, name):
        first, second = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        if first not in state or second not in state:
            continue  # that a tensor is absent is told by whoever loads them
        a, b = _start(layer, name, config, checkpoint)
        whole[first] = torch.cat([state[first].float(), a.to(state[first].device)], dim=0)
        whole[second] = torch.cat([state[second].float(), -b.to(state[second].device)], dim=1)
    return whole


def _layers(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    found = ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))
    return ((path, layer) for path, layer in found if name in layer.r)


def _start(layer: Any, name: str, config: LoraConfig, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """A0 and B0 of one layer, as PEFT computes them when such an adapter starts."""
    from copy import deepcopy

    import torch
    from peft.tuners.lora.layer import Linear

    base = layer.get_base_layer()
    if type(base).__name__ not in ("Linear", "Conv1D") or not base.weight.is_floating_point():
        raise IntegrityError(
            f"{checkpoint.reference}: its start ({config.init_lora_weights}) cannot be computed from a "
            f"{type(base).__name__}; give quantization=none (--quantization none), or convert it where it was trained"
        )
    rank = layer.r[name] // 2
    scratch = Linear(
        deepcopy(base),
        "start",
        config=config,
        r=rank,
        lora_alpha=layer.scaling[name] * (rank**0.5 if config.use_rslora else rank),
    )
    with torch.no_grad():
        return scratch.lora_A["start"].weight.float().detach(), scratch.lora_B["start"].weight.float().detach()
