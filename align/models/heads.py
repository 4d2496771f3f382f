"""Score heads: a reward model is a LoRA adapter plus one linear layer, kept together through every round trip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError
from align.models.adapters import (
    WEIGHTS,
    Resident,
    _load_state,
    _read_adapter,
    check_base,
    lora_arguments,
    refuse_reward,
    tokenizer_home,
)
from align.models.loading import Precision, load_base
from align.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch

    from align.config import LoraSettings
    from align.registry import Checkpoint, Registry


def start_reward(
    registry: Registry, checkpoint: Checkpoint, lora: LoraSettings | None, precision: Precision
) -> Resident:
    """A trainable reward model `default`: a LoRA adapter and a scalar score head over the checkpoint's base.

    Started from a policy, the adapter continues the policy's weights (as InstructGPT does, Ouyang et al. 2022, 3.5).
    """
    refuse_reward(checkpoint)
    base = registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
    model = load_base(base, precision, head="score")
    tokenizer = load_tokenizer(tokenizer_home(checkpoint, base))
    _refuse_ambiguous_padding(checkpoint, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    resident = Resident(model, tokenizer, base, registry=registry)
    _wrap(resident, checkpoint, lora)
    resident.model.train()
    return resident


def _wrap(resident: Resident, checkpoint: Checkpoint, lora: LoraSettings | None) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    if checkpoint.is_adapter:
        check_base(resident, checkpoint)
        config = LoraConfig.from_pretrained(checkpoint.location)
    else:
        config = LoraConfig(**lora_arguments(lora))
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.SEQ_CLS, ["score"], False
    state = _read_adapter(checkpoint) if checkpoint.is_adapter else None
    resident.model = get_peft_model(resident.model, config)
    if state is not None:
        _continue(resident.model, state, checkpoint)


def _continue(model: Any, state: dict[str, Any], checkpoint: Checkpoint) -> None:
    from peft import get_peft_model_state_dict

    new = get_peft_model_state_dict(model)
    head = {key: tensor for key, tensor in new.items() if ".score." in key}
    _load_state(model, state | head, "default", checkpoint)


def _refuse_ambiguous_padding(checkpoint: Checkpoint, tokenizer: Any) -> None:
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise IntegrityError(
            f"{checkpoint.reference}: its tokenizer pads with the EOS token, so the last token of a text cannot be "
            "told from padding; give the tokenizer a pad token of its own"
        )


def load_score_head(checkpoint: Checkpoint) -> torch.nn.Linear:
    """The frozen score head saved with a reward adapter: a Linear(hidden, 1) without bias, fp32."""
    import torch
    from safetensors.torch import load_file

    state = load_file(Path(checkpoint.location) / WEIGHTS)
    weights = [tensor for key, tensor in state.items() if key.endswith("score.weight")]
    if checkpoint.kind != "reward" or len(weights) != 1 or weights[0].shape[0] != 1:
        raise IntegrityError(
            f"{checkpoint.reference}: expected a reward model with one score head, found kind {checkpoint.kind} and "
            f"{len(weights)} heads; train one with python -m align.reward"
        )
    head = torch.nn.Linear(weights[0].shape[1], 1, bias=False)
    head.weight.data.copy_(weights[0])
    return head.requires_grad_(False)


def score_last_token(hidden: torch.Tensor, attention_mask: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """Scores (B,) read at each row's last attended token; hidden (B, T, H), attention_mask (B, T)."""
    import torch

    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * positions).argmax(dim=1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return head(hidden[rows, last].to(head.weight.dtype)).squeeze(-1)
