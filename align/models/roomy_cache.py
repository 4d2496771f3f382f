"""A cache whose layers write a new token beside the old ones; transformers copies keys and values for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_SPARE = 64
"""columns allocated beyond those that are there"""


class RoomyLayer(DynamicLayer):
    """Keys and values (B, H, T, D) as views of larger tensors, which are allocated anew when others were assigned."""

    keys: Tensor
    values: Tensor

    def __init__(self, plain: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(vars(plain))
        self._views: tuple[Tensor | None, Tensor | None] = (None, None)
        self._rooms: tuple[Tensor, ...] = ()
        self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns and return all of them."""
        new = key_states.shape[-2]
        columns: int = self.keys.shape[-2]
        ours = self.keys is self._views[0] and self.values is self._views[1]
        if not ours or self._end + new > self._rooms[0].shape[-2]:
            self._rooms = tuple(self._allocate(held, columns + new + _SPARE) for held in (self.keys, self.values))
            self._end = columns
        begin, self._end = self._end, self._end + new
        first = self._end - columns - new
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, begin : self._end] = states
        self.keys, self.values = self._views = (
            self._rooms[0][:, :, first : self._end],
            self._rooms[1][:, :, first : self._end],
        )
        return self.keys, self.values

    @staticmethod
    def _allocate(held: Tensor, columns: int) -> Tensor:
        room = held.new_empty((*held.shape[:2], columns, held.shape[3]))
        room[:, :, : held.shape[2]] = held
        return room


def make_room(cache: Any) -> None:
    """Let the plain layers of a cache be roomy from now on; layers of another kind stay. Nothing may need gradients."""
    if torch.is_grad_enabled():
        return
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.keys.dim() == 4:
            cache.layers[index] = RoomyLayer(layer)
