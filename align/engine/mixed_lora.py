"""LoRA layers of a batch whose rows run through different adapters: the deltas of all rows from two matrix products.

PEFT 0.21 picks the rows of each adapter out of the batch and puts them back, adapter by adapter and layer by layer,
which takes longer than the base for eight adapters. While every row has one new token, the layers here compute the
hidden vector of every adapter for every row, drop those that are not the row's own, and multiply once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor


class _Matrices(NamedTuple):
    """The matrices of some adapters on one layer, side by side: (all ranks, in) and (out, all ranks)."""

    down: Tensor
    up: Tensor
    scale: float
    owners: tuple[str, ...]
    """the adapter of each of the ranks"""


class _Joined(NamedTuple):
    """The tuner's layers of a model with the joined matrices of some adapters, and what they were made of."""

    configured: tuple[str, ...]
    names: tuple[str, ...]
    layers: list[tuple[Any, _Matrices | None]] | None
    """None where a layer is not plain LoRA"""
    sources: list[Tensor]
    versions: int


_JOINED: WeakKeyDictionary[Any, _Joined] = WeakKeyDictionary()
"""by model, for the adapters asked for last"""


@contextmanager
def joined_deltas(model: Any, adapters: Sequence[str]) -> Iterator[bool]:
    """Run a batch of one row per adapter through a PEFT model; yields False where a layer is not plain LoRA."""
    joined = _joined(model, set(adapters))
    masks: dict[tuple[str, ...], Tensor | None] = {}
    try:
        for layer, matrices in joined.layers or ():
            layer.forward = _forward_of(layer, matrices, list(adapters), masks)
        yield joined.layers is not None
    finally:
        for layer, _ in joined.layers or ():
            vars(layer).pop("forward", None)


def _joined(model: Any, used: set[str]) -> _Joined:
    """Return the joined matrices of these adapters; those of up to twice as many serve too, and need no copying."""
    configured, held = tuple(model.peft_config), _JOINED.get(model)
    names = tuple(name for name in configured if name in used)
    if held is not None and held.configured == configured and used & set(configured) <= set(held.names):
        fresh = held.versions == sum(source._version for source in held.sources)
        if fresh and len(held.names) <= (2 * len(names) if len(names) > 1 else len(names)):
            return held
    layers = _tuner_layers(model)
    plain = all(_is_plain(layer, names) for layer in layers)
    pairs = [(layer, [name for name in names if name in layer.lora_A]) for layer in layers] if plain else []
    sources = [part[name].weight for layer, own in pairs for name in own for part in (layer.lora_A, layer.lora_B)]
    matrices = [(layer, _side_by_side(layer, own)) for layer, own in pairs] if plain else None
    joined = _Joined(configured, names, matrices, sources, sum(source._version for source in sources))
    _JOINED[model] = joined
    return joined


def _tuner_layers(model: Any) -> list[Any]:
    """Return the modules that PEFT put into a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _is_plain(layer: Any, names: Sequence[str]) -> bool:
    """Return whether a layer is LoRA over a linear layer with nothing but two matrices and a factor for these."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return False
    used = [name for name in names if name in layer.lora_A]
    if any(type(part[name]).__name__ != "Linear" for name in used for part in (layer.lora_A, layer.lora_B)):
        return False
    return not layer.lora_embedding_A and not any(
        layer.lora_B[n].bias is not None or n in layer.lora_variant for n in used
    )


def _side_by_side(layer: Any, names: Sequence[str]) -> _Matrices | None:
    """Return the matrices of some adapters, those of one as they are; None where they left the layer alone."""
    import torch

    pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]
    owners = tuple(name for name, (down, _, _) in zip(names, pairs, strict=True) for _ in range(len(down)))
    if len(pairs) < 2:
        return _Matrices(*pairs[0], owners) if pairs else None
    with torch.no_grad():
        down, up = torch.cat([a for a, _, _ in pairs]), torch.cat([b * scale for _, b, scale in pairs], dim=1)
    return _Matrices(down, up, 1.0, owners)


def _forward_of(
    layer: Any, matrices: _Matrices | None, adapters: list[str], masks: dict[tuple[str, ...], Tensor | None]
) -> Any:
    """Return the forward pass of a layer for these rows."""
    from torch.nn.functional import linear

    base, forward = layer.base_layer, type(layer).forward
    if matrices is None:
        return base.forward
    if matrices.owners not in masks:
        masks[matrices.owners] = _drop_others(matrices, adapters)
    others = masks[matrices.owners]

    def joined(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() != 3 or x.shape[1] != 1 or len(x) != len(adapters):
            # A pass over whole prompts is bound by arithmetic: there each row through its own adapter is less of it.
            return forward(layer, x, *args, adapter_names=adapters, **kwargs)
        result: Tensor = base(x)
        hidden = linear(x.to(matrices.down.dtype), matrices.down)
        if others is not None:
            hidden.masked_fill_(others, 0.0)
        return result.add_(linear(hidden, matrices.up).to(result.dtype), alpha=matrices.scale)

    return joined


def _drop_others(matrices: _Matrices, adapters: list[str]) -> Tensor | None:
    """Return which numbers (B, 1, all ranks) of the hidden vectors are not of the row's own adapter; None if none."""
    import torch

    if {*matrices.owners} == {*adapters} and len({*adapters}) == 1:
        return None
    own = [[owner == adapter for owner in matrices.owners] for adapter in adapters]
    return ~torch.tensor(own, device=matrices.down.device)[:, None]
