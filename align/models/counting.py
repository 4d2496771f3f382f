"""Counting parameters on a model without storage, before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.models.hub import no_telemetry
from align.models.loading import explained
from align.models.lora import insert, new_config, saved_config

if TYPE_CHECKING:
    from align.config import LoraSettings
    from align.registry import Checkpoint


def context_length(base: Checkpoint) -> int | None:
    """How many positions a base holds, or None when its config does not say."""
    return getattr(text_config(base), "max_position_embeddings", None)


def vocabulary_size(base: Checkpoint) -> int | None:
    """How many tokens a base has embeddings for, or None when its config does not say."""
    return getattr(text_config(base), "vocab_size", None)


def text_config(base: Checkpoint) -> Any:
    """The part of a base's config that is about text."""
    with explained(base):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(base.location, revision=base.revision).get_text_config()


def count_trainable(parent: Checkpoint, base: Checkpoint, lora: LoraSettings | None) -> tuple[int, int]:
    """Trainable and total parameters of a run from `parent`: its own adapter's, a new LoRA's, or all."""
    import torch

    model = shape_of(base)
    with torch.device("meta"):
        if lora is not None and parent.is_adapter:
            model = insert(model, saved_config(model, parent, trainable=True), "default")
        elif lora is not None:
            model = insert(model, new_config(model, lora), "default")
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters)


def shape_of(base: Checkpoint) -> Any:
    """A base as modules and shapes on torch's meta device: nothing is read but its config."""
    no_telemetry()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), explained(base):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.location, revision=base.revision))
