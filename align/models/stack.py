"""A fresh adapter trained beside a frozen one, and the two as one adapter afterwards.

Both add to the same layer: W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2], which has rank r1 + r2 and scale 1.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.models.adapter_config import adapter_parameters, set_trainable
from align.models.adapter_kinds import NO_PRODUCT, TAKES_FROM_BASE
from align.tuners import LORA, require, tuner_type

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from align.config import AdapterSettings
    from align.registry import Checkpoint

FRESH, FROZEN, WHOLE = "default", "ref", "stacked"
"""the trained adapter, the frozen one under the name by which TRL asks for the reference, and both as one"""


def check_stackable(checkpoint: Checkpoint, settings: AdapterSettings | None) -> None:
    """Raise UsageError unless a checkpoint is an adapter on which a new one can be stacked exactly."""
    if not checkpoint.is_adapter:
        raise UsageError(
            f"adapter=stack: {checkpoint.reference} is a base without an adapter; leave adapter out, a new adapter is "
            "what a base gets anyway"
        )
    path = Path(checkpoint.location) / "adapter_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    fresh = dict(settings) if settings is not None else {}
    for side in (stored, {"peft_type": LORA, **fresh}):
        require(tuner_type(side), "stack", "adapter=stack", "use adapter=continue, or LoRA for both")
    not_products = [key for key in NO_PRODUCT if stored.get(key) or fresh.get(key)]
    if not_products:
        why = (
            "DoRA normalises base and update together"
            if "use_dora" in not_products
            else f"{not_products[0]} is no product"
        )
        raise UsageError(
            f"adapter=stack: {checkpoint.reference} with a new adapter beside it cannot be one adapter ({why}); "
            "use adapter=continue, or plain LoRA for both"
        )
    if str(start := fresh.get("init_lora_weights", True)).startswith((*TAKES_FROM_BASE, "loftq")):
        raise UsageError(
            f"adapter=stack: a new adapter that starts as {start} has no place on another; remove the start"
        )


def set_beside_frozen(model: Any, frozen: str) -> None:
    """Let `default` stand for itself and the adapter `frozen` together from here on, whoever activates it."""
    model.frozen_partner = frozen
    model.set_adapter = types.MethodType(_set_adapter, model)
    model.set_adapter(FRESH)


def frozen_partner(model: Any) -> str | None:
    """Return the name of the frozen adapter that always acts with `default`, or None."""
    return getattr(model, "frozen_partner", None)


def _set_adapter(model: Any, name: str, inference_mode: bool = False) -> None:
    """Set the active adapter as PEFT does, except that the fresh adapter never stands alone."""
    type(model).set_adapter(model, name, inference_mode)
    frozen: str = model.frozen_partner
    if name == FRESH:
        # The first is the one a trainer saves and restores as its own. A score head has no second one beside it.
        for _, layer in lora_layers(model):
            layer.set_adapter([FRESH, frozen], inference_mode)
        model.base_model.active_adapter = [FRESH, frozen]
    set_trainable(model, frozen, False)


def prove_fresh(model: Any) -> None:
    """Raise IntegrityError unless the fresh adapter adds exactly nothing yet and the frozen one stays as it is."""
    updates = [key for key, value in model.named_parameters() if f"lora_B.{FRESH}." in key and bool(value.any())]
    moving = [value for value in adapter_parameters(model, FROZEN) if value.requires_grad]
    if updates or moving or model.active_adapters != [FRESH, FROZEN]:
        raise IntegrityError(
            f"the policy does not start as the frozen adapter: {len(updates)} updates are not zero, {len(moving)} "
            f"frozen tensors would train, active are {model.active_adapters}; report this"
        )


def concatenate(model: Any, names: tuple[str, ...] = (FROZEN, FRESH), target: str = WHOLE) -> None:
    """Add adapter `target` to a PEFT model: the exact sum of adapters `names` as one of rank r1 + r2 and scale 1.

    A module that only some of them adapt gets zeros in B for the rest, so every module has the same rank and any
    loader of LoRA takes it; those parts of A are fresh, so that training can go on with them.
    """
    from peft import LoraConfig
    from peft.utils import ModulesToSaveWrapper

    layers = list(lora_layers(model))
    rank = max(sum(layer.r.get(name, 0) for name in names) for _, layer in layers)
    first = model.peft_config[names[0]]
    copied = next(filter(None, (model.peft_config[name].modules_to_save for name in names)), None)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_targets(model, names), task_type=first.task_type,
        fan_in_fan_out=first.fan_in_fan_out, modules_to_save=copied, inference_mode=True,
    )  # fmt: skip
    model.add_adapter(target, config)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and target in module.modules_to_save:
            trained = next(name for name in names if name in module.modules_to_save)
            module.modules_to_save[target].load_state_dict(module.modules_to_save[trained].state_dict())
    set_trainable(model, target, False)
    for _, layer in lora_layers(model):
        start = 0
        whole_a, whole_b = _matrices(layer, target)
        for name in names:
            if name not in layer.r:
                continue
            a, b = _matrices(layer, name)
            part = slice(start, start + a.shape[0])
            whole_a.data[part] = a.data.to(whole_a.dtype)
            whole_b.data[:, part] = (b.data.float() * layer.scaling[name]).to(whole_b.dtype)
            start = part.stop


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and module of every layer that a LoRA adapter is set on."""
    from peft.tuners.lora import LoraLayer

    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def _matrices(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of one adapter of a layer; those of a convolution have more dimensions."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _targets(model: Any, names: tuple[str, ...]) -> list[str]:
    """Return module names that cover what the adapters are set on; full paths where one is given by a pattern."""
    sets = [model.peft_config[name].target_modules for name in names]
    if not any(isinstance(found, str) for found in sets):
        return sorted(set().union(*sets))
    prefix = "base_model.model."
    adapted = (path for path, layer in lora_layers(model) if any(name in layer.r for name in names))
    return sorted(path.removeprefix(prefix) for path in adapted)
