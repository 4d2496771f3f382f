"""The four models of PPO as adapters on one resident base, and the forward passes made with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.models.adapters import (
    Resident,
    adapter_parameters,
    attach_adapter,
    copy_adapter,
    prove_frozen_copy,
    start_policy,
)
from align.models.dropout import switch_off_dropout
from align.models.heads import load_score_head, score_last_token
from align.models.loading import Precision, checkpoint_activations
from align.models.tokenizers import check_template
from align.rl.maths import entropy, token_logprobs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.config import StageConfig
    from align.registry import Checkpoint, Registry
    from align.rl.rollout import Batch

POLICY, REFERENCE, REWARD, VALUE = "default", "reference", "reward_model", "value_model"


@dataclass(frozen=True)
class Quartet:
    """Policy, reference, reward model and value model over one base.

    The reference is the bare base when the policy did not start from an adapter; there may be no reward model.
    """

    resident: Resident
    reference: str | None
    score_head: torch.nn.Linear | None
    value_head: torch.nn.Linear

    @property
    def model(self) -> Any:
        """The one model that carries all adapters."""
        return self.resident.model

    def policy_parameters(self) -> list[torch.nn.Parameter]:
        """What the policy loss trains."""
        return list(adapter_parameters(self.model, POLICY))

    def value_parameters(self) -> list[torch.nn.Parameter]:
        """What the value loss trains: the value adapter and its head."""
        return [*adapter_parameters(self.model, VALUE), *self.value_head.parameters()]

    def trained_tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name."""
        adapters = {
            key: value.detach()
            for key, value in self.model.named_parameters()
            if f".{POLICY}." in key or f".{VALUE}." in key
        }
        return adapters | {"value_head": self.value_head.weight.detach()}


def build_quartet(
    registry: Registry, start: Checkpoint, reward_model: Checkpoint | None, config: StageConfig
) -> Quartet:
    """Load the base once and set four adapters on it.

    The policy continues the start's adapter and the reference is a frozen copy of it. The value model starts as a copy
    of the reward model, head included; without one it starts as a copy of the policy with a head of zeros.
    """
    resident = start_policy(registry, start, config.lora, Precision.of(config))
    reference = _freeze_reference(resident, start)
    if reward_model is not None:
        attach_adapter(resident, reward_model, REWARD)
        check_template(reward_model, resident.tokenizer, "the policy")
        score_head = load_score_head(reward_model).to(resident.model.device)
        copy_adapter(resident.model, REWARD, VALUE, trainable=True)
    else:
        score_head = None
        copy_adapter(resident.model, POLICY, VALUE, trainable=True)
    # With dropout the first ratio would not be 1.
    switch_off_dropout(resident.model)
    if config.gradient_checkpointing:
        checkpoint_activations(resident.model.get_base_model())
    resident.model.set_adapter(POLICY)
    resident.model.eval()
    return Quartet(resident, reference, score_head, _value_head(resident.model, score_head))


def _freeze_reference(resident: Resident, start: Checkpoint) -> str | None:
    if not start.is_adapter:
        return None
    copy_adapter(resident.model, POLICY, REFERENCE)
    prove_frozen_copy(resident.model, POLICY, REFERENCE)
    return REFERENCE


def _value_head(model: Any, score_head: torch.nn.Linear | None) -> torch.nn.Linear:
    import torch

    hidden = model.get_base_model().get_input_embeddings().weight.shape[1]
    head = torch.nn.Linear(score_head.in_features if score_head else hidden, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(score_head.weight) if score_head else head.weight.zero_()
    return head.to(model.device)


@contextmanager
def active(quartet: Quartet, adapter: str | None) -> Iterator[None]:
    """Run forward passes through one adapter, or through the bare base with None; at rest the policy is active."""
    if adapter is None:
        with quartet.model.disable_adapter():
            yield
        return
    quartet.model.set_adapter(adapter, inference_mode=adapter in (REFERENCE, REWARD))
    try:
        yield
    finally:
        quartet.model.set_adapter(POLICY)


def policy_logits(quartet: Quartet, batch: Batch, temperature: float) -> Tensor:
    """Logits (B, T, V) from which each completion token was chosen, through the active adapter."""
    # The logit that chooses a token stands one position before it.
    logits = quartet.model.get_base_model()(**batch.inputs(), logits_to_keep=batch.width + 1).logits
    logits = logits[:, -batch.width - 1 : -1]
    return logits if temperature == 1.0 else logits / temperature


def completion_logprobs(quartet: Quartet, batch: Batch, temperature: float) -> Tensor:
    """Log-probabilities (B, T) of the completion tokens through the active adapter."""
    return token_logprobs(policy_logits(quartet, batch, temperature), batch.completion_ids)


def completion_entropy(quartet: Quartet, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the completion tokens and entropies (B, T), through the active adapter."""
    logits = policy_logits(quartet, batch, temperature)
    return token_logprobs(logits, batch.completion_ids), entropy(logits)


def completion_values(quartet: Quartet, batch: Batch) -> Tensor:
    """Values (B, T) of the states in which each completion token was chosen, through the active adapter."""
    hidden = _last_hidden(quartet, batch)[:, -batch.width - 1 : -1]
    return quartet.value_head(hidden.to(quartet.value_head.weight.dtype)).squeeze(-1)


def completion_scores(quartet: Quartet, batch: Batch) -> Tensor:
    """The reward model's score (B,) of each whole sequence, through the active adapter."""
    assert quartet.score_head is not None
    return score_last_token(_last_hidden(quartet, batch), batch.attention_mask, quartet.score_head)


def _last_hidden(quartet: Quartet, batch: Batch) -> Tensor:
    return quartet.model.get_base_model().base_model(**batch.inputs()).last_hidden_state
