"""The layer that turns a hidden state into a score, in full precision whatever the base is held in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScoreLayer(nn.Linear):
    """A linear layer of one score, (..., H) to (..., 1), that computes in fp32 also under autocast.

    In bfloat16 scores have three digits: close answers would tie, and steps of 1e-4 would vanish in its weights.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., 1) of hidden states (..., H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float())


def use_score_layer(model: nn.Module) -> None:
    """Put a ScoreLayer with the same weight in the place of a model's score head."""
    old = model.score
    assert isinstance(old, nn.Linear)
    layer = ScoreLayer(old.in_features, old.out_features, bias=False, device=old.weight.device, dtype=torch.float32)
    layer.weight.data.copy_(old.weight)
    layer.requires_grad_(old.weight.requires_grad)
    model.score = layer
