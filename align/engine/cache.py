"""The keys and values a batch has computed: rows taken out, rows of another batch added, padding cut off.

Columns are counted from the left, padding included. Rows end at the right edge, so a batch is made longer or shorter
on the left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache


def can_change(cache: Cache) -> bool:
    """Whether every layer keeps plain keys and values, all or a sliding window of them; a recurrent one does not."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def keep_rows(cache: Cache, places: Tensor) -> None:
    """Keep the rows at some places and no others."""
    cache.reorder_cache(places)


def add_rows(cache: Cache, other: Cache) -> None:
    """Put the rows of another cache of the same model and columns below."""
    import torch

    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        if ours.keys is not None:
            ours.keys = torch.cat([ours.keys, theirs.keys])
            ours.values = torch.cat([ours.values, theirs.values])


def set_columns(cache: Cache, columns: int) -> None:
    """Add empty columns on the left, or cut some off; a mask has to tell which are empty."""
    for layer in cache.layers:
        _set_columns(layer, columns)


def _set_columns(layer: Any, columns: int) -> None:
    import torch

    if layer.keys is None:
        return
    held = columns
    if layer.is_sliding:
        held = min(columns, layer.sliding_window - 1)
        layer.cumulative_length = columns
    missing = held - layer.keys.shape[-2]
    if missing > 0:
        layer.keys, layer.values = (
            torch.nn.functional.pad(part, (0, 0, missing, 0)) for part in (layer.keys, layer.values)
        )
    elif missing < 0:  # a view: the next step copies it anyway
        layer.keys, layer.values = layer.keys[..., -held:, :], layer.values[..., -held:, :]
