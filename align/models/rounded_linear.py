"""A frozen base's linear layers in eight or four bits on a CPU, for models that only generate and are measured.

Everything beside the linear layers, adapters and embeddings too, stays as it is. Training does not come here: its
log-probs must be the trained model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import UsageError
from align.models.loading import Precision
from align.models.probes import probe_logits

_SAMPLE = (
    "The lighthouse keeper wrote a letter to his sister every Sunday. He told her about the storms, the ships that "
    "passed in the night and the price of oil, and asked whether the apple trees behind the house had borne fruit. In "
    "1998 he stopped writing, because the light had been made automatic and he could walk home and ask her himself."
)

_LARGEST = 127
_SMALLEST = 1e-30
_GROUP = 32
"""weights of an output that share a step and a zero in four bits, as in GGUF's Q4_0 and Q4_1"""
_OUTPUTS = 16
"""the kernel for four bits takes multiples of so many outputs"""


class _Weights:
    """Rounded weights (out, in) of one layer, or of several that read the same input.

    Weights are whole numbers of 8 bits times a step of each output. An input is two of 8 bits, coarse and fine, times a
    step of each row: it is rounded to a 32,258th of its largest number, and no row depends on its batch. In four bits
    one row by itself is multiplied with them as they are, in bfloat16.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        self.few = None
        if bits == 4 and weight.shape[1] % _GROUP == 0 and weight.shape[0] % _OUTPUTS == 0:
            self.few, self._places, weight = _in_four_bits(weight)
        self._steps = weight.abs().amax(dim=1).clamp_min_(_SMALLEST).div_(_LARGEST)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack((weight / self._steps[:, None]).round_().to(torch.int8), None)
        self.most_few = 1

    def dequantized(self) -> Tensor:
        """Return the weights (out, in) as float32."""
        return self._packed.to_dense().T * self._steps[:, None]

    def multiply(self, x: Tensor) -> Tensor:
        """Return the products (M, out), float32, of inputs (M, in)."""
        if self.few is not None and len(x) <= self.most_few:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.few, _GROUP, self._places)
            return product.float()
        steps = x.abs().amax(dim=-1, keepdim=True).float().clamp_min_(_SMALLEST).div_(_LARGEST)
        scaled = x / steps
        coarse = scaled.round()
        fine = scaled.sub_(coarse).mul_(2 * _LARGEST).round_()
        rows, twice = len(x), torch.cat([coarse, fine]).to(torch.int8)
        both = torch.ops.onednn.qlinear_pointwise(
            twice, 1.0, 0, self._packed, self._steps, self._zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        both[:rows].add_(both[rows:], alpha=0.5 / _LARGEST).mul_(steps)
        return both[:rows]


def _in_four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (out, in) packed, the steps and zeros (in / 32, out, 2) of their groups, and the rounded weights.

    The ends of each group are kept, so weights that came from Q4_0 or Q4_1 are found again.
    """
    groups = weight.unflatten(1, (-1, _GROUP))
    low, high = groups.aminmax(dim=-1)
    steps = ((high - low) / 15).clamp_min_(_SMALLEST).bfloat16()
    zeros = (low + 8 * steps.float()).bfloat16()
    scales, middles = steps.float()[..., None], zeros.float()[..., None]
    whole = ((groups - middles) / scales + 8).round_().clamp_(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.flatten(1).int(), 1)
    places = torch.stack([steps.T, zeros.T], dim=-1).contiguous()
    return packed, places, ((whole - 8) * scales + middles).flatten(1)


class _Shared:
    """The product of one input with the weights of several layers, made when the first asks for it."""

    def __init__(self, weights: _Weights, sizes: Sequence[int]) -> None:
        self.weights, self._sizes = weights, list(sizes)
        self.ends = list(itertools.accumulate(sizes))
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def take(self, part: int, x: Tensor) -> Tensor:
        """Return one layer's part (..., out) of the product with x (..., in), which nobody else holds."""
        if len(self._sizes) == 1:
            return self._product(x)
        if x is not self._input or self._parts[part] is None:
            self._input, self._parts = x, list(self._product(x).split_with_sizes(self._sizes, dim=-1))
        taken, self._parts[part] = self._parts[part], None
        if not any(one is not None for one in self._parts):
            self._input = None
        assert taken is not None
        return taken.contiguous()

    def _product(self, x: Tensor) -> Tensor:
        return self.weights.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class RoundedLinear(nn.Linear):
    """A linear layer whose weights (out, in) are held rounded only; it takes and gives the type it had."""

    def __init__(self, shared: _Shared, part: int, layer: Any) -> None:
        nn.Module.__init__(self)
        self._shared, self._part, self.dtype = shared, part, layer.weight.dtype
        self.out_features, self.in_features = _as_linear(layer).shape
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """The rounded weights, computed anew at every call: for what reads a layer, such as PEFT attaching to it."""
        end = self._shared.ends[self._part]
        return self._shared.weights.dequantized()[end - self.out_features : end].to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) by the weights."""
        product = self._shared.take(self._part, x)
        if product.dtype != x.dtype:
            product = product.to(x.dtype)
        return product if self.bias is None else product + self.bias


def round_base(model: Any, tokenizer: Any, reference: str, precision: Precision) -> str:
    """Round the layers of a base under its LoRA adapters, and return a line that says what that changed.

    The loss is measured: KL from the exact base's distribution over a short English text, in nats a token. A head that
    shares its weights with the embedding gets rounded ones of its own, and the embedding keeps its. Raises UsageError
    for a base without linear layers, and for an adapter that computes with the base's weights.
    """
    asked = f"--quantization {precision.quantization}"
    for name, config in getattr(model, "peft_config", {}).items():
        if config.peft_type != "LORA" or getattr(config, "use_dora", False):
            kind = "DoRA" if config.peft_type == "LORA" else config.peft_type.value
            raise UsageError(
                f"{asked}: the adapter {name} is {kind}, which may compute with the base's exact weights; only LoRA "
                "runs over rounded ones on a CPU; give --quantization none"
            )
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    sample = torch.tensor([tokenizer.encode(_SAMPLE)[:window]], device=model.device)
    groups, exact = _layers_by_input(model, sample)
    if not groups:
        raise UsageError(f"{asked}: {reference} has no linear layers that could be rounded; give none")
    weights = [_replace(model, layers, precision) for layers in groups]
    # In four bits the row by itself is the coarser case.
    for one in weights:
        one.most_few = sample.numel()
    after = probe_logits(model, sample, bare=True).log_softmax(dim=-1)
    for one in weights:
        one.most_few = 1
    loss = float((exact.exp() * (exact - after)).sum(dim=-1).mean())
    return (
        f"{reference}: {sum(map(len, groups))} linear layers are {precision.quantization} now; on a sample text its "
        f"predictions move by {loss:.4f} nats a token, so answers differ from the exact weights'"
    )


def _layers_by_input(model: Any, ids: Tensor) -> tuple[list[list[Any]], Tensor]:
    """Return a base's linear layers, those that read one input together, and its log-probs of a text.

    PEFT keeps an adapter's own matrices, which are linear layers too, in dictionaries; a pass without adapters does not
    call them.
    """
    from transformers.pytorch_utils import Conv1D

    groups: dict[int, list[Any]] = {}
    inputs: list[Tensor] = []

    def note(layer: Any, given: tuple[Tensor, ...]) -> None:
        inputs.append(given[0])  # as long as it is held, no other has its id
        groups.setdefault(id(given[0]), []).append(layer)

    layers = [layer for layer in model.modules() if type(layer) in (nn.Linear, Conv1D)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        logits = probe_logits(model, ids, bare=True).log_softmax(dim=-1)
    finally:
        for hook in hooks:
            hook.remove()
    taken: set[Any] = set()
    found = []
    for group in groups.values():
        found.append([layer for layer in dict.fromkeys(group) if layer not in taken])
        taken.update(group)
    return [group for group in found if group], logits


def _replace(model: Any, layers: list[Any], precision: Precision) -> _Weights:
    """Round some layers that read one input, and put the rounded ones where they were."""
    # The kernel for four bits gives bfloat16, in which many tokens would have the same logit.
    bits = 4 if precision.quantization == "int4" and model.get_output_embeddings() not in layers else 8
    parts = [_as_linear(layer).detach().float() for layer in layers]
    shared = _Shared(_Weights(torch.cat(parts), bits), [len(part) for part in parts])
    rounded = {layer: RoundedLinear(shared, part, layer) for part, layer in enumerate(layers)}
    for module, name, layer in list(_places_of(model, rounded)):
        setattr(module, name, rounded[layer])
    return shared.weights


def _places_of(model: Any, layers: dict[Any, Any]) -> Iterator[tuple[Any, str, Any]]:
    for module in model.modules():
        for name, child in module.named_children():
            if child in layers:
                yield module, name, child


def _as_linear(layer: Any) -> Tensor:
    """Return the weights (out, in) of a linear layer, or of GPT-2's, which holds them the other way."""
    weight: Tensor = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.T
