"""Counting parameters on a model without storage, before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.models.adapter_config import explain_settings, insert_adapter, new_config, saved_config, set_trainable
from align.models.adapter_kinds import read_adapter_settings
from align.models.base_files import build_shapes
from align.models.lora_starts import plain_start
from align.tuners import find_obstacle, tuner_type

if TYPE_CHECKING:
    from align.config import StageConfig
    from align.registry import Checkpoint


def count_trainable(parent: Checkpoint, base: Checkpoint, config: StageConfig) -> tuple[int, int]:
    """Trainable and total parameters of a run from `parent`: its own adapter's, a new LoRA's, or all."""
    parameters = list(build_trained_shapes(build_shapes(base), parent, config).parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters)


def build_trained_shapes(model: Any, parent: Checkpoint, config: StageConfig) -> Any:
    """Return the shapes of a base with what a run from `parent` adds to it: its own adapter, a new one, or both.

    Tuners that are built from the base's values are left out: there are none yet.
    """
    import torch

    if config.new_adapter is None:
        return model
    with torch.device("meta"):
        if config.fresh_adapter or not parent.is_adapter:
            adapter = new_config(model, config.new_adapter)
            if is_countable(adapter.peft_type.value):
                with explain_settings(config.new_adapter):
                    model = insert_adapter(model, plain_start(adapter), "default")
        if parent.is_adapter and is_countable(tuner_type(read_adapter_settings(parent))):
            name = "frozen" if config.fresh_adapter else "default"
            model = insert_adapter(model, saved_config(model, parent, trainable=not config.fresh_adapter), name)
            set_trainable(model, name, not config.fresh_adapter)
    return model


def is_countable(tuner: str) -> bool:
    """Return whether PEFT can set an adapter of this tuner on shapes without values."""
    return find_obstacle(tuner, "count") is None
