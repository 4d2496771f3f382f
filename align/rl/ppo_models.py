"""The four models of PPO as adapters on one base in memory, and their forward passes over completions.

Rows of a rollout are packed without padding where the model can read them so, else padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.models.adapter_config import adapter_parameters
from align.models.adapters import LoadedBase, attach_adapter, copy_adapter, prove_frozen_copy, start_policy
from align.models.fused_layers import Switch, fuse_layers
from align.models.head_scores import make_score_layer, score_tokens
from align.models.heads import load_score_head
from align.models.loading import Precision, checkpoint_activations, switch_off_dropout
from align.models.packed import accepts_packed_rows, plain_head
from align.models.tokenizers import check_template
from align.registry import Checkpoint, Registry
from align.rl.maths import entropy, token_logprobs
from align.rl.ppo_settings import PpoConfig
from align.rl.rollout import Rollout, SamplingPolicy

POLICY, REFERENCE, REWARD, VALUE = "default", "reference", "reward_model", "value_model"


@dataclass
class PpoModels:
    """Policy, reference, reward model and value model over one base; `load_ppo_models` makes it.

    The reference is the bare base when the policy did not start from an adapter; there may be no reward model. The
    value model is an adapter, or the policy's own when it is a head on the policy.
    """

    loaded: LoadedBase
    reference: str | None
    score_head: torch.nn.Linear | None
    value_head: torch.nn.Linear
    value: str
    precision: Precision
    packed: bool
    """whether rows are packed: the base must be able to read them so"""
    fused: Switch

    @property
    def model(self) -> Any:
        """The one PEFT model with all adapters."""
        return self.loaded.model

    @property
    def policy(self) -> SamplingPolicy:
        """The policy, to sample from."""
        return SamplingPolicy(self.model, POLICY, self.loaded.tokenizer, self.precision)

    @property
    def exact(self) -> bool:
        """True when all arithmetic is in single precision: two ways to one number then differ by rounding only."""
        return not self.precision.uses_bf16 and self.precision.quantization == "none"

    def policy_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the policy loss trains."""
        return list(adapter_parameters(self.model, POLICY))

    def value_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the value loss alone trains: the value adapter, if any, and its head."""
        adapter = adapter_parameters(self.model, VALUE) if self.value == VALUE else ()
        return [*adapter, *self.value_head.parameters()]

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return every tensor that training changes, by name."""
        adapters = {
            key: value.detach()
            for key, value in self.model.named_parameters()
            if f".{POLICY}." in key or f".{VALUE}." in key
        }
        return adapters | {"value_head": self.value_head.weight.detach()}

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[None]:
        """Run forward passes through one adapter, or the bare base with None; afterwards the policy is active."""
        if adapter is None:
            with self.model.disable_adapter():
                yield
            return
        self.model.set_adapter(adapter, inference_mode=adapter in (REFERENCE, REWARD))
        try:
            yield
        finally:
            self.model.set_adapter(POLICY)


@dataclass(frozen=True)
class BatchLayout:
    """B rows with n completion tokens in all, as the inputs of the base model without its language head."""

    inputs: dict[str, Any]
    sources: Tensor
    """(n,) indices of the hidden states, flattened to (N, H), that predict the completion tokens"""
    targets: Tensor
    """(n,) the completion tokens"""
    rows: Tensor
    columns: Tensor
    """(n,) where in (B, T) each completion token belongs"""
    last: Tensor
    """(B,) indices of the hidden states of the rows' last tokens"""
    shape: tuple[int, int]
    """(B, T)"""

    def scatter(self, values: Tensor) -> Tensor:
        """Return values of the completion tokens (n,) as (B, T), zero on padding."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def build_layout(rollout: Rollout, index: Tensor, *, packed: bool) -> BatchLayout:
    """Return the rows of an index as one batch; the same index always gives the same shapes, and so the same bits.

    Rows are packed without padding where the model can read them so, else padded.
    """
    return _packed(rollout, index) if packed else _padded(rollout, index)


def micro_batches(rollout: Rollout, rows: Tensor, size: int, *, packed: bool) -> list[Tensor]:
    """Split rows into indices of `size` rows: neighbours share prompts when packed, padded ones have like lengths."""
    sizes = rollout.prompt_mask[rows].sum(dim=1) + rollout.lengths[rows]
    order = rows.argsort() if packed else sizes.argsort(stable=True)
    return list(rows[order].split(size))


def _packed(rollout: Rollout, index: Tensor) -> BatchLayout:
    """One row of tokens; a prompt that several completions answer is in it once."""
    from align.models.packed import backbone_inputs
    from align.models.prefixes import IGNORED, TokenRow, pack, prompt_keys

    sequences = []
    for row, source in enumerate(index.tolist()):
        prompt, completion = rollout.prompts[source], rollout.completions[source]
        labels = [IGNORED] * len(prompt) + completion
        # A token's label stands one column after the state that predicts it, so that the first comes to column 0.
        sequences.append(TokenRow(prompt + completion, labels, row, 1 - len(prompt)))
    batch = pack(sequences, prompt_keys(sequences), index.device)
    shape = len(sequences), int(rollout.lengths[index].max())
    return BatchLayout(
        backbone_inputs(batch), batch.sources, batch.targets, batch.rows, batch.columns, batch.last, shape
    )


def _padded(rollout: Rollout, index: Tensor) -> BatchLayout:
    """A batch without columns of padding only."""
    prompt_mask, mask = rollout.prompt_mask[index], rollout.mask[index].long()
    left = rollout.prompt_ids.shape[1] - int(prompt_mask.sum(dim=1).max())
    width = int(mask.sum(dim=1).max())
    ids = torch.cat([rollout.prompt_ids[index, left:], rollout.completion_ids[index, :width]], dim=1)
    attention_mask = torch.cat([prompt_mask[:, left:], mask[:, :width]], dim=1)
    inputs = {
        "input_ids": ids, "attention_mask": attention_mask, "use_cache": False,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }  # fmt: skip
    length, begin = ids.shape[1], ids.shape[1] - width
    rows, columns = mask[:, :width].nonzero(as_tuple=True)
    targets = rows * length + begin + columns
    starts = torch.arange(len(index), device=index.device) * length
    last = starts + begin + mask.sum(dim=1) - 1
    return BatchLayout(inputs, targets - 1, ids.flatten()[targets], rows, columns, last, (len(index), width))


class PolicyOutput(NamedTuple):
    """The policy's numbers of a batch, each (B, T); values only where the value head is on the policy."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


def load_ppo_models(
    registry: Registry, start: Checkpoint, reward_model: Checkpoint | None, config: PpoConfig
) -> PpoModels:
    """Load the base once and attach the adapters.

    The policy continues the start's adapter and the reference is a frozen copy of it. The value model starts as a copy
    of the reward model, head included; without one it starts as a copy of the policy with a head of zeros. A head on
    the policy starts at zero.
    """
    precision = Precision.of(config)
    loaded = start_policy(registry, start, config.lora, precision)
    reference, score_head = REFERENCE if start.is_adapter else None, None
    if reference is not None:
        copy_adapter(loaded.model, POLICY, reference)
        prove_frozen_copy(loaded.model, POLICY, reference)
    if reward_model is not None:
        attach_adapter(loaded, reward_model, REWARD)
        check_template(reward_model, loaded.tokenizer, "the policy")
        score_head = make_score_layer(load_score_head(reward_model).weight).to(loaded.model.device)
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
    if value == VALUE and score_head is not None:
        weight = score_head.weight
    else:
        weight = torch.zeros(1, causal.get_input_embeddings().weight.shape[1])
    value_head = make_score_layer(weight).to(loaded.model.device)
    packed = plain_head(causal) is not None and accepts_packed_rows(causal, config.max_length)
    return PpoModels(loaded, reference, score_head, value_head, value, precision, packed, fuse_layers(causal))


def compute_policy(models: PpoModels, layout: BatchLayout, temperature: float) -> PolicyOutput:
    """Return log-probabilities of the completion tokens and entropies through the active adapter.

    The logits of a whole batch never exist at once. With a value head on the policy the values come from the same pass.
    """
    head = plain_head(models.model.get_base_model())
    if head is None:
        return _compute_from_logits(models, layout, temperature)
    hidden = _last_hidden(models, layout)[layout.sources]
    tempered = hidden if temperature == 1.0 else hidden / temperature
    if temperature != 1.0 and head.bias is not None:
        # The product of its weight and tempered states is tempered already.
        head = SimpleNamespace(weight=head.weight, bias=head.bias / temperature)
    scores = score_tokens(head, tempered, layout.targets, frozen=True)
    values = layout.scatter(models.value_head(hidden).squeeze(-1)) if models.value == POLICY else None
    return PolicyOutput(layout.scatter(scores.log_probs), layout.scatter(scores.entropy), values)


def _compute_from_logits(models: PpoModels, layout: BatchLayout, temperature: float) -> PolicyOutput:
    """The same for a model that does more to its logits than multiply: those of the completions exist at once."""
    with models.policy.autocast():
        logits = models.model.get_base_model()(**layout.inputs, logits_to_keep=layout.shape[1] + 1).logits
    # The first kept position predicts the first token of the longest completion.
    first = logits.shape[1] - layout.shape[1] - 1
    chosen = (logits[layout.rows, layout.columns + first] / temperature)[None]
    logprobs, entropies = token_logprobs(chosen, layout.targets[None])[0], entropy(chosen)[0]
    return PolicyOutput(layout.scatter(logprobs), layout.scatter(entropies), None)


def compute_values(models: PpoModels, layout: BatchLayout) -> Tensor:
    """Return V(s_t) (B, T), s_t the state that chose completion token t, through the active adapter."""
    return layout.scatter(models.value_head(_last_hidden(models, layout)[layout.sources]).squeeze(-1))


def compute_scores(models: PpoModels, layout: BatchLayout) -> Tensor:
    """Return the reward model's score (B,) of each whole sequence, through the active adapter."""
    assert models.score_head is not None
    return models.score_head(_last_hidden(models, layout)[layout.last]).squeeze(-1)


def _last_hidden(models: PpoModels, layout: BatchLayout) -> Tensor:
    """Hidden states (N, H) through the active adapter; the language head is not computed."""
    with models.policy.autocast():
        output = models.model.get_base_model().base_model(**layout.inputs)
    return output.last_hidden_state.flatten(0, 1)
