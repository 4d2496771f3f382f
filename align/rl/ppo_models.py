"""The four models of PPO as adapters on one loaded base, and what each says of completions in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from align.models.adapters import (
    LoadedBase,
    adapter_parameters,
    attach_adapter,
    copy_adapter,
    prove_frozen_copy,
    start_policy,
)
from align.models.dropout import switch_off_dropout
from align.models.heads import load_score_head
from align.models.loading import Precision, checkpoint_activations
from align.models.packed import plain_head, reads_packed_rows
from align.models.tokenizers import check_template
from align.models.trained_head import score_tokens
from align.rl.maths import entropy, token_logprobs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.registry import Checkpoint, Registry
    from align.rl.batch_layout import Layout
    from align.rl.ppo_settings import PpoConfig

POLICY, REFERENCE, REWARD, VALUE = "default", "reference", "reward_model", "value_model"


@dataclass
class Quartet:
    """Policy, reference, reward model and value model over one base.

    The reference is the bare base when the policy did not start from an adapter; there may be no reward model. The
    value model is an adapter, or the policy's own when it is a head on the policy.
    """

    loaded: LoadedBase
    reference: str | None
    score_head: torch.nn.Linear | None
    value_head: torch.nn.Linear
    value: str
    precision: Precision
    packs: bool
    """whether the base reads packed rows"""

    @property
    def model(self) -> Any:
        """The one model that carries all adapters."""
        return self.loaded.model

    @property
    def exact(self) -> bool:
        """Whether all arithmetic is in single precision, so that two ways to one number differ by rounding only."""
        return not self.precision.uses_bf16 and self.precision.quantization == "none"

    def policy_parameters(self) -> list[torch.nn.Parameter]:
        """What the policy loss trains."""
        return list(adapter_parameters(self.model, POLICY))

    def value_parameters(self) -> list[torch.nn.Parameter]:
        """What the value loss alone trains: the value adapter, if there is one, and its head."""
        adapter = adapter_parameters(self.model, VALUE) if self.value == VALUE else ()
        return [*adapter, *self.value_head.parameters()]

    def trained_tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name."""
        adapters = {
            key: value.detach()
            for key, value in self.model.named_parameters()
            if f".{POLICY}." in key or f".{VALUE}." in key
        }
        return adapters | {"value_head": self.value_head.weight.detach()}


class PolicyReading(NamedTuple):
    """What the policy says of a batch, each (B, T); values only where they come from the same pass."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


def build_quartet(registry: Registry, start: Checkpoint, reward_model: Checkpoint | None, config: PpoConfig) -> Quartet:
    """Load the base once and set the adapters on it.

    The policy continues the start's adapter and the reference is a frozen copy of it. The value model starts as a copy
    of the reward model, head included; without one it starts as a copy of the policy with a head of zeros. As a head
    on the policy it starts at zero.
    """
    precision = Precision.of(config)
    loaded = start_policy(registry, start, config.lora, precision)
    reference, score_head = _freeze_reference(loaded, start), None
    if reward_model is not None:
        attach_adapter(loaded, reward_model, REWARD)
        check_template(reward_model, loaded.tokenizer, "the policy")
        score_head = _full_precision(load_score_head(reward_model).weight).to(loaded.model.device)
        score_head.requires_grad_(False)
    if config.value == "adapter":
        copy_adapter(loaded.model, REWARD if score_head else POLICY, VALUE, trainable=True)
    # With dropout the first ratio would not be 1.
    switch_off_dropout(loaded.model)
    causal = loaded.model.get_base_model()
    if config.gradient_checkpointing:
        checkpoint_activations(causal)
    loaded.model.set_adapter(POLICY)
    loaded.model.eval()
    value = VALUE if config.value == "adapter" else POLICY
    head = _value_head(loaded.model, score_head if value == VALUE else None)
    return Quartet(loaded, reference, score_head, head, value, precision, _packs(causal, config.max_length))


def _freeze_reference(loaded: LoadedBase, start: Checkpoint) -> str | None:
    if not start.is_adapter:
        return None
    copy_adapter(loaded.model, POLICY, REFERENCE)
    prove_frozen_copy(loaded.model, POLICY, REFERENCE)
    return REFERENCE


def _value_head(model: Any, score_head: torch.nn.Linear | None) -> torch.nn.Linear:
    import torch

    hidden = model.get_base_model().get_input_embeddings().weight.shape[1]
    weight = score_head.weight if score_head is not None else torch.zeros(1, hidden)
    return _full_precision(weight).to(model.device)


def _full_precision(weight: Tensor) -> torch.nn.Linear:
    """A score layer of its own with this weight (1, H)."""
    import torch

    from align.models.score_layer import ScoreLayer

    layer = ScoreLayer(weight.shape[1], 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def _packs(causal: Any, longest: int) -> bool:
    return plain_head(causal) is not None and reads_packed_rows(causal, longest)


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


@contextmanager
def arithmetic(quartet: Quartet) -> Iterator[None]:
    """Compute in bfloat16 where the settings ask for it, adapters included, as the other stages' trainers do."""
    import torch

    with torch.autocast(quartet.model.device.type, torch.bfloat16, enabled=quartet.precision.uses_bf16):
        yield


def read_policy(quartet: Quartet, layout: Layout, temperature: float) -> PolicyReading:
    """Log-probabilities of the completion tokens and entropies through the active adapter, without full logits.

    With a value head on the policy the values come from the same pass.
    """
    causal = quartet.model.get_base_model()
    head = plain_head(causal)
    if head is None:
        return _read_full_logits(quartet, layout, temperature)
    hidden = last_hidden(quartet, layout)[layout.sources]
    tempered = hidden if temperature == 1.0 else hidden / temperature
    scores = score_tokens(_tempered(head, temperature), tempered, layout.targets, frozen=True)
    values = layout.spread(quartet.value_head(hidden).squeeze(-1)) if quartet.value == POLICY else None
    return PolicyReading(layout.spread(scores.log_probs), layout.spread(scores.entropy), values)


def _tempered(head: Any, temperature: float) -> Any:
    """A head whose product with tempered states is tempered logits: the weight is shared, the bias divided."""
    if temperature == 1.0 or head.bias is None:
        return head
    from types import SimpleNamespace

    return SimpleNamespace(weight=head.weight, bias=head.bias / temperature)


def _read_full_logits(quartet: Quartet, layout: Layout, temperature: float) -> PolicyReading:
    """The same where a model does more to its logits than multiply: those of the completions exist at once."""
    with arithmetic(quartet):
        logits = quartet.model.get_base_model()(**layout.inputs, logits_to_keep=layout.shape[1] + 1).logits
    kept = logits.shape[1]
    # The first kept position predicts the first token of the longest completion.
    chosen = logits[layout.rows, layout.columns + kept - layout.shape[1] - 1] / temperature
    logprobs, spread = token_logprobs(chosen[None], layout.targets[None])[0], entropy(chosen[None])[0]
    return PolicyReading(layout.spread(logprobs), layout.spread(spread), None)


def read_values(quartet: Quartet, layout: Layout) -> Tensor:
    """Values (B, T) of the states in which each completion token was chosen, through the active adapter."""
    return layout.spread(quartet.value_head(last_hidden(quartet, layout)[layout.sources]).squeeze(-1))


def read_scores(quartet: Quartet, layout: Layout) -> Tensor:
    """The reward model's score (B,) of each whole sequence, through the active adapter."""
    assert quartet.score_head is not None
    return quartet.score_head(last_hidden(quartet, layout)[layout.last]).squeeze(-1)


def last_hidden(quartet: Quartet, layout: Layout) -> Tensor:
    """Hidden states (places, H) of a layout through the active adapter; the language head is not touched."""
    with arithmetic(quartet):
        output = quartet.model.get_base_model().base_model(**layout.inputs)
    return output.last_hidden_state.flatten(0, 1)
