"""Counting parameters on a model without storage, before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.models.adapters import lora_arguments

if TYPE_CHECKING:
    from align.config import LoraSettings
    from align.registry import Checkpoint


def context_length(base: Checkpoint) -> int | None:
    """How many positions a base holds, or None when its config does not say."""
    from align.models.loading import explained

    with explained(base):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(base.location, revision=base.revision).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def count_trainable(parent: Checkpoint, base: Checkpoint, lora: LoraSettings | None) -> tuple[int, int]:
    """Trainable and total parameters of a run from `parent`: its own adapter's, or those of a new LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    if parent.is_adapter:
        config = LoraConfig.from_pretrained(parent.location)
        config.inference_mode = False
    else:
        config = LoraConfig(**lora_arguments(lora), task_type="CAUSAL_LM")
    with torch.device("meta"):
        shape = AutoConfig.from_pretrained(base.location, revision=base.revision)
        model = get_peft_model(AutoModelForCausalLM.from_config(shape), config)
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)
