"""Switching dropout off wherever a model has it, for losses that compare two passes of one model."""

from __future__ import annotations

from typing import Any


def switch_off_dropout(model: Any) -> None:
    """Make training and evaluation the same function.

    Dropout modules are not all: OPT calls the function with a rate it keeps as a number, attention modules do so too,
    and a layer can be dropped whole. TRL 1.16's `disable_dropout` only knows the modules.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
