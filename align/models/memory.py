"""The peak memory of a training step, by part, before a weight is loaded.

Activations are not a formula: the model is run once on tensors without storage and what autograd keeps is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from align.config import StageConfig
from align.models.adapter_config import adapter_modules, has_fused_experts, is_linear
from align.models.base_files import build_shapes
from align.models.fused_layers import fuse_layers
from align.models.head_scores import FROZEN_TILE, tile_rows
from align.models.loading import Precision, checkpoint_activations
from align.models.packed import FAMILIES
from align.models.start_checks import build_trained_shapes
from align.registry import Checkpoint

LossHead = Literal["packed", "fused", "full", "score"]

_FULL_PRECISION = 4
_HALF_PRECISION = 2
_BYTES = {"nf4": 0.516, "int8": 1.004}
"""bytes a quantized weight takes: 4 or 8 bits and its share of the scales (nf4: a byte every 64, quantized again)"""

_ADAMW_STATES = 2
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768
"""TRL 1.16's fused head scores so many tokens against so many words at once"""
_FUSED_TILES = 8.25
"""float32 arrays of a tile's size that its backward pass holds at once where there is no Triton kernel"""
_PACKED_TILES = {"frozen": 4, "learned": 7}
"""the same for the head of the fast path, in the forward pass when it is frozen, else in the backward pass"""
_FULL_LOGITS = 4
"""logits, their log-softmax, and the gradients of both"""
_HEAP_HOLES = {"adapter": 0.5, "bf16": 1.0, "bf16 checkpointed": 0.5, "quantized": 1.4, "full": 0.35}
"""of computed activations and logits: what glibc's heap keeps in holes from step to step. It differs by a third from
run to run; measured with benchmarks/memory_plan.py. A GPU's allocator was not"""
_COMPILED_KERNELS = 140 << 20
"""bytes of what oneDNN keeps for products in bfloat16 (quiet_libraries), and of the holes around it"""
_USUAL_HIDDENS = 20
"""hidden states a layer keeps, for the rare model that cannot be run without storage; Llama with LoRA keeps 19"""


@dataclass(frozen=True)
class TrainingPass:
    """A forward and backward pass: its rows (two a preference pair), and the tokens of its longest row."""

    rows: int
    tokens: int
    head: LossHead = "packed"
    """the fast path, TRL's own `fused` head, the `full` logits of every token (transformers' loss), or one `score`"""
    filled: float = 1.0
    """the share of positions that are no padding and, on the fast path, which alone gains by it, no repeated prompt"""

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns that are computed."""
        return (1, round(self.rows * self.tokens * self.filled)) if self.head == "packed" else (self.rows, self.tokens)

    @property
    def positions(self) -> int:
        """The number of tokens that are computed, padding included."""
        return self.shape[0] * self.shape[1]


def estimate_memory(parent: Checkpoint, base: Checkpoint, config: StageConfig, work: TrainingPass) -> dict[str, int]:
    """Return the bytes at the peak of a training step, by part, and their `total` beside the bare process.

    Parts: weights, adapters, gradients, optimizer, activations, logits, allocator. Gradients grow while activations
    are freed, so the total counts the larger of the two moments, not both.
    """
    precision = Precision.of(config) if config.new_adapter is not None else Precision(bf16=False)
    model = build_shapes(base).to(torch.bfloat16 if precision.uses_bf16 else torch.float32)
    model = build_trained_shapes(model, parent, config)
    if work.head == "packed" and model.config.model_type not in FAMILIES:
        work = replace(work, head="fused")
    sizes = _parameter_bytes(model, precision, adapted=config.new_adapter is not None)
    copies, frozen = config.adapters
    trained = copies * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sizes["adapters"] *= copies + frozen
    sizes["gradients"] = trained * _FULL_PRECISION
    sizes["optimizer"] = trained * _FULL_PRECISION * _ADAMW_STATES
    sizes["activations"], computed = _activations(model, config, work)
    sizes["logits"] = _logits(model, Precision.of(config), work)
    churned = sizes["activations"] + sizes["logits"]
    sizes["allocator"] = 0 if torch.cuda.is_available() else _beside_tensors(config, computed + sizes["logits"])
    held = sum(sizes[part] for part in ("weights", "adapters", "optimizer", "allocator"))
    if config.gradient_accumulation_steps > 1:
        return sizes | {"total": held + churned + sizes["gradients"]}
    return sizes | {"total": held + max(churned, sizes["gradients"])}


def _beside_tensors(config: StageConfig, freed: int) -> int:
    """Return the bytes of a process on a CPU that hold no tensor, when a step computes so many bytes."""
    precision = Precision.of(config)
    kernels = _COMPILED_KERNELS if precision.uses_bf16 else 0
    if not config.fragments_heap:
        return kernels
    if config.new_adapter is None:
        kind = "full"
    elif precision.quantization != "none":
        kind = "quantized"
    elif precision.uses_bf16:
        kind = "bf16 checkpointed" if config.gradient_checkpointing else "bf16"
    else:
        kind = "adapter"
    return kernels + int(_HEAP_HOLES[kind] * freed)


def _parameter_bytes(model: Any, precision: Precision, *, adapted: bool) -> dict[str, int]:
    quantized = {id(layer.weight) for layer in _quantized_layers(model, precision)}
    sizes = {"weights": 0.0, "adapters": 0.0}
    for parameter in model.parameters():
        part = "adapters" if adapted and parameter.requires_grad else "weights"
        width = _BYTES[precision.quantization] if id(parameter) in quantized else parameter.element_size()
        sizes[part] += parameter.numel() * width
    return {part: int(size) for part, size in sizes.items()}


def _quantized_layers(model: Any, precision: Precision) -> list[Any]:
    if precision.quantization == "none":
        return []
    head, adapters = model.get_output_embeddings(), adapter_modules(model)
    linear = (module for module in model.modules() if is_linear(module) and id(module) not in adapters)
    return [module for module in linear if module is not head]


class _QuantizedLinear(torch.nn.Linear):
    """Stands for a quantized layer, which the fast path does not fuse."""


def _activations(model: Any, config: StageConfig, work: TrainingPass) -> tuple[int, int]:
    """Return the bytes of activations at the peak, and of all that a step computes for its backward pass.

    They differ where activations are computed again. Each layer's then come and go on their own, but what stays of it
    (gradients, the graph) lies in the memory that they leave, so that the next layer's do not fit there.
    """
    causal = getattr(model, "get_base_model", lambda: model)()
    for layer in _quantized_layers(model, Precision.of(config)):
        if type(layer) is torch.nn.Linear:
            layer.__class__ = _QuantizedLinear
    if getattr(config, "fast_path", False) and causal.config.model_type in FAMILIES:
        fuse_layers(causal)
    saved = _kept_by_autograd(causal, config, work)
    if not config.gradient_checkpointing:
        return saved, saved
    checkpoint_activations(causal)
    causal.enable_input_require_grads()
    # While one layer is computed again, it keeps what it would have kept.
    kept = _kept_by_autograd(causal, config, work) + saved // model.config.get_text_config().num_hidden_layers
    return kept, saved


def _kept_by_autograd(causal: Any, config: StageConfig, work: TrainingPass) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, at most."""
    if work.head == "packed":
        causal.config._attn_implementation = _whole_attention()
    body = causal.base_model
    tensors = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    # The product of fused experts has a shape rule for bfloat16 only.
    halves = has_fused_experts(body) and any(tensor.dtype == torch.float32 for tensor in tensors.values())
    saved: dict[int, Any] = {}
    with FakeTensorMode():
        imagined = {name: _imagine(tensor, halves) for name, tensor in tensors.items()}
        own = {tensor.untyped_storage()._cdata for tensor in imagined.values()}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        ids = torch.zeros(work.shape, dtype=torch.long)
        mask = None if work.head == "packed" else torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        arithmetic = torch.autocast("cpu", torch.bfloat16, enabled=Precision.of(config).uses_bf16)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), arithmetic:
                torch.func.functional_call(body.train(), imagined, kwargs=inputs)
        except RuntimeError:
            text = causal.config.get_text_config()
            return _USUAL_HIDDENS * text.num_hidden_layers * work.positions * text.hidden_size * _FULL_PRECISION
        return (2 if halves else 1) * sum(storage.nbytes() for storage in saved.values())


def _whole_attention() -> str:
    """Register an attention without a mask, which transformers would build without storage, and return its name."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("align_whole", sdpa_attention_forward)
    AttentionMaskInterface.register("align_whole", lambda *_, **__: None)
    return "align_whole"


def _imagine(tensor: Any, halves: bool) -> Any:
    """Return a tensor like this one, without storage but on a real device, whose kernels are then asked."""
    empty = torch.empty(tensor.shape, dtype=torch.bfloat16 if halves and tensor.is_floating_point() else tensor.dtype)
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def _logits(model: Any, precision: Precision, work: TrainingPass) -> int:
    """Return the bytes above the hidden states at the worst moment of a step."""
    if work.head == "score":
        return 0
    head = model.get_output_embeddings()
    vocabulary, width = head.weight.shape
    learned = vocabulary * width * _FULL_PRECISION if head.weight.requires_grad else 0
    if work.head == "full":
        return learned + _FULL_LOGITS * work.positions * vocabulary * _FULL_PRECISION
    if work.head == "packed":
        tokens, words = (tile_rows(vocabulary), vocabulary) if learned else FROZEN_TILE
        tile = min(tokens, work.positions) * min(words, vocabulary) * _FULL_PRECISION
        return 2 * learned + _PACKED_TILES["learned" if learned else "frozen"] * tile
    tile = min(work.positions, _TILE_TOKENS) * min(vocabulary, _TILE_VOCABULARY)
    product = tile * (_HALF_PRECISION if precision.uses_bf16 else _FULL_PRECISION)
    beside = 0 if torch.cuda.is_available() else int((_FUSED_TILES - 1) * tile * _FULL_PRECISION)
    return learned + product + beside
