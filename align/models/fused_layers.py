"""Layers of a packed pass in one autograd step each: LoRA products, gated MLPs and RMS norms, with fewer tensors.

PEFT and transformers compose them of elementwise operations whose results autograd keeps, and under autocast PEFT
casts every input to single precision and back. Here a product adds its update in place, and the backward pass computes
again what is cheap: the idea is that of Unsloth's kernels, in torch's own operations. Numbers are equal up to rounding.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear, silu

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}


class Switch:
    """Turns the fused layers of one model on and off; off for comparisons only."""

    on = True


class _Product(NamedTuple):
    """A frozen weight (out, in) with its bias, and the two matrices and the factor of a LoRA on it, if there is one."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    scale: float

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the product (T, out) and the hidden vectors of the update (T, r)."""
        result = linear(x, self.weight, self.bias)
        if self.down is None or self.up is None:
            return result, None
        hidden = linear(x, self.down.to(x.dtype))
        return result.addmm_(hidden, self._scaled_up().T), hidden

    def backward(
        self, gradient: Tensor, x: Tensor, hidden: Tensor | None, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients by x, added `into` that of other products, and by the two matrices if these learn."""
        by_x = gradient @ self.weight if into is None else into.addmm_(gradient, self.weight)
        if self.down is None or self.up is None or hidden is None:
            return by_x, None, None
        by_hidden = gradient @ self._scaled_up()
        by_x.addmm_(by_hidden, self.down.to(x.dtype))
        by_down = (by_hidden.T @ x).to(self.down.dtype) if self.down.requires_grad else None
        by_up = (gradient.T @ hidden).to(self.up.dtype).mul_(self.scale) if self.up.requires_grad else None
        return by_x, by_down, by_up

    def _scaled_up(self) -> Tensor:
        assert self.up is not None
        return (self.up * self.scale).to(self.weight.dtype)


class _LoraProduct(Function):
    """x W' + s (x A') B'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result, hidden = _Product(*parts).apply(rows)
        ctx.save_for_backward(rows, hidden, *parts[:4])
        ctx.scale = parts[4]
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, hidden, *tensors = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        by_x, by_down, by_up = _Product._make((*tensors, ctx.scale)).backward(flat, rows, hidden)
        return by_x.view(*gradient.shape[:-1], -1), None, None, by_down, by_up, None


class _GatedMlp(Function):
    """down(silu(gate(x)) * up(x)); what is between the products is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, up, down = (_Product(*parts[begin : begin + 5]) for begin in (0, 5, 10))
        gated, gate_hidden = gate.apply(rows)
        upper, up_hidden = up.apply(rows)
        result, down_hidden = down.apply(silu(gated).mul_(upper))
        ctx.scales = gate.scale, up.scale, down.scale
        hiddens = gate_hidden, up_hidden, down_hidden
        ctx.save_for_backward(rows, gated, upper, *hiddens, *gate[:4], *up[:4], *down[:4])
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, gated, upper, gate_hidden, up_hidden, down_hidden, *tensors = ctx.saved_tensors
        gate, up, down = (_Product._make((*tensors[4 * i : 4 * i + 4], ctx.scales[i])) for i in range(3))
        flat = gradient.reshape(-1, gradient.shape[-1])
        active = silu(gated)
        by_inner, *by_down = down.backward(flat, active * upper, down_hidden)
        by_upper = active.mul_(by_inner)
        by_gated = torch.ops.aten.silu_backward(by_inner.mul_(upper), gated)
        by_x, *by_gate = gate.backward(by_gated, rows, gate_hidden)
        by_x, *by_up = up.backward(by_upper, rows, up_hidden, by_x)
        of_parts = (number for pair in (by_gate, by_up, by_down) for number in (None, None, *pair, None))
        return by_x.view(*gradient.shape[:-1], -1), *of_parts


class _RmsNorm(Function):
    """x / sqrt(mean x^2 + eps) * w, in single precision, with a frozen w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = x.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse = torch.rsqrt(length * length / x.shape[-1] + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return (exact * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        exact = x.float()
        weighted = gradient.float() * weight.float()
        along = (weighted * exact).sum(-1, keepdim=True) * (inverse * inverse * inverse / x.shape[-1])
        return weighted.mul_(inverse).addcmul_(exact, along, value=-1).to(x.dtype), None, None


def fuse_layers(model: Any) -> Switch:
    """Let the layers of a model that are of a known kind compute so; the rest stay as they are.

    A layer takes its stock way where an adapter does more than its two matrices, weights learn or are quantized, or
    types differ.
    """
    switch = Switch()
    for module in model.modules():
        name = type(module).__name__
        if name in _NORMS:
            _replace_forward(module, switch, _norm)
        elif name in _GATED and isinstance(module.act_fn, nn.SiLU | _silu_class()):
            _replace_forward(module, switch, _mlp)
        elif _is_lora(module):
            _replace_forward(module, switch, _lora)
    return switch


def _silu_class() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _replace_forward(module: Any, switch: Switch, fused: Callable[[Any, Tensor], Tensor | None]) -> None:
    stock = module.forward

    def forward(_self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        result = fused(module, x) if switch.on and not args and not options else None
        return stock(x, *args, **options) if result is None else result

    module.forward = types.MethodType(forward, module)


def _norm(module: Any, x: Tensor) -> Tensor | None:
    weight = module.weight
    return (
        None if weight.requires_grad or weight.dtype != x.dtype else _RmsNorm.apply(x, weight, module.variance_epsilon)
    )


def _lora(module: Any, x: Tensor) -> Tensor | None:
    product = _product(module)
    return None if product is None or _types_differ(product, x) else _LoraProduct.apply(x, *product)


def _mlp(module: Any, x: Tensor) -> Tensor | None:
    products = [_product(part) for part in (module.gate_proj, module.up_proj, module.down_proj)]
    if any(product is None or _types_differ(product, x) for product in products):
        return None
    return _GatedMlp.apply(x, *(part for product in products if product is not None for part in product))


def _types_differ(product: _Product, x: Tensor) -> bool:
    """Return whether a product would be computed in another type than that of its weights and its input."""
    kind = x.device.type
    computes = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return not x.dtype == product.weight.dtype == computes


def _is_lora(module: Any) -> bool:
    from peft.tuners import lora

    return type(module) is lora.Linear


def _product(layer: Any) -> _Product | None:
    """Return what a layer multiplies with now; None where it does anything else, or its weight learns."""
    if layer._forward_hooks or layer._forward_pre_hooks:  # PEFT names the adapters of single rows in such a hook
        return None
    base = layer.base_layer if _is_lora(layer) else layer
    if type(base) is not nn.Linear or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    active = [] if base is layer or layer.disable_adapters or layer.merged else layer.active_adapters
    names = [name for name in active if name in layer.lora_A]
    if not names:
        return _Product(base.weight, base.bias, None, None, 0.0)
    name, *others = names
    down, up, dropout = (part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    drops = layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1) > 0
    plain = type(down) is type(up) is nn.Linear and up.bias is None
    if others or drops or not plain or name in layer.lora_variant or layer.fan_in_fan_out:
        return None
    return _Product(base.weight, base.bias, down.weight, up.weight, layer.scaling[name])
