"""LoRA layers of a batch whose rows run through different adapters: the deltas of all rows from two batched products.

PEFT 0.21 picks the rows of each adapter out of the batch and puts them back, adapter by adapter and layer by layer,
which takes longer than the base for eight adapters. While every row has one new token, the layers here sort the rows by
adapter once and multiply each group with the matrices of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor


class _Matrices(NamedTuple):
    """The matrices of some adapters on one layer, one behind the other: (adapters, in, rank) and (adapters, rank, out).

    Ranks below the largest are filled with zeros.
    """

    down: Tensor
    up: Tensor
    scale: float
    names: tuple[str, ...]


class _Groups(NamedTuple):
    """The rows of a batch by adapter, each group as long as the longest: it is filled with the first row."""

    order: Tensor | None
    """(adapters * longest) rows; None where the batch is in this order already"""
    rows: Tensor
    """the rows that have an adapter"""
    places: Tensor
    """of each of these in the order"""


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
    groups: dict[tuple[str, ...], _Groups] = {}
    try:
        for layer, matrices in joined.layers or ():
            layer.forward = _forward_of(layer, matrices, list(adapters), groups)
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
    matrices = [(layer, _stacked(layer, own)) for layer, own in pairs] if plain else None
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


def _stacked(layer: Any, names: Sequence[str]) -> _Matrices | None:
    """Return the matrices of some adapters, those of one as they are; None where they left the layer alone."""
    import torch
    from torch.nn.functional import pad

    pairs = [(layer.lora_A[name].weight.T, layer.lora_B[name].weight.T) for name in names]
    if len(pairs) < 2:
        return _Matrices(pairs[0][0][None], pairs[0][1][None], layer.scaling[names[0]], (*names,)) if pairs else None
    most = max(len(up) for _, up in pairs)
    with torch.no_grad():
        down = torch.stack([pad(one, (0, most - one.shape[1])) for one, _ in pairs])
        scaled = (one * layer.scaling[name] for name, (_, one) in zip(names, pairs, strict=True))
        up = torch.stack([pad(one, (0, 0, 0, most - len(one))) for one in scaled])
    return _Matrices(down, up, 1.0, (*names,))


def _forward_of(
    layer: Any, matrices: _Matrices | None, adapters: list[str], groups: dict[tuple[str, ...], _Groups]
) -> Any:
    """Return the forward pass of a layer for these rows."""
    import torch

    base, forward = layer.base_layer, type(layer).forward
    if matrices is None or not {*matrices.names} & {*adapters}:
        return base.forward
    down, up, scale, names = matrices
    if names not in groups:
        groups[names] = _group(adapters, names, down.device)
    order, rows, places = groups[names]

    def joined(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() != 3 or x.shape[1] != 1 or len(x) != len(adapters):
            # A pass over whole prompts is bound by arithmetic: there each row through its own adapter is less of it.
            return forward(layer, x, *args, adapter_names=adapters, **kwargs)
        result: Tensor = base(x)
        given = (x if order is None else x.index_select(0, order)).to(down.dtype)
        delta = torch.bmm(torch.bmm(given.view(len(names), -1, x.shape[-1]), down), up)
        delta = delta.view(-1, 1, up.shape[-1]).to(result.dtype)
        if order is None:
            return result.add_(delta, alpha=scale)
        return result.index_add_(0, rows, delta.index_select(0, places), alpha=scale)

    return joined


def _group(adapters: list[str], names: tuple[str, ...], device: Any) -> _Groups:
    """Return the rows of a batch in groups, one for each of these adapters."""
    import torch

    members = [[row for row, adapter in enumerate(adapters) if adapter == name] for name in names]
    longest = max(map(len, members))
    order = [row for group in members for row in [*group, *(longest - len(group)) * [0]]]
    found = [(row, begin * longest + place) for begin, group in enumerate(members) for place, row in enumerate(group)]
    rows, places = (torch.tensor(one, device=device) for one in zip(*found, strict=True))
    sorted_already = order == list(range(len(adapters)))
    return _Groups(None if sorted_already else torch.tensor(order, device=device), rows, places)
