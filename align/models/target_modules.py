"""The modules of a model that an adapter is set on: those that are there, and those that were asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.config import LoraSettings
from align.errors import UsageError, nearest
from align.tuners import OWN_TARGETS, tuner_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from align.config import AdapterSettings

ALL_LINEAR = "all-linear"

_EXPERT_NAMES = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""Names that PEFT 0.21 takes for experts and their router, wherever they stand, in the models it converts."""

_RAW_WEIGHT_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_RAW_WEIGHT_NAMES = {"out_proj", "conv1d"}
"""PEFT 0.21 refuses these modules of these models: their kernels read the weight itself, past any adapter."""

_NOT_ADAPTED = {"embed_tokens", "embed_positions", "embed_in", "embed_out", "wte", "wpe", "lm_head", "score"}
"""Stored matrices that are no linear layers inside the model."""


def asked_targets(settings: AdapterSettings) -> str | list[str] | None:
    """Return the modules that settings of a new adapter ask for; None where PEFT chooses them by the architecture."""
    if isinstance(settings, LoraSettings):
        return settings.target_modules
    default = None if tuner_type(settings) in OWN_TARGETS else ALL_LINEAR
    return settings.get("target_modules", default)


def all_linear(model: Any) -> str | list[str]:
    """Return PEFT's `all-linear`, or the names it stands for where some must be left out."""
    left_out = {name for name in _EXPERT_NAMES if converts_experts(model)}
    left_out |= _RAW_WEIGHT_NAMES if model.config.model_type in _RAW_WEIGHT_MODELS else set()
    if left_out or has_fused_experts(model):
        return sorted(set(linear_names(model)) - left_out)
    return ALL_LINEAR


def check_targets(model: Any, settings: AdapterSettings) -> None:
    """Raise UsageError with the model's linear modules unless every module asked for is there."""
    import re

    asked = asked_targets(settings)
    if asked == ALL_LINEAR or not asked:
        return
    paths = [path for path, module in model.named_modules() if path]
    if isinstance(asked, str):
        missing = [] if any(re.fullmatch(asked, path) for path in paths) else [asked]
    else:
        ends = {path[start:] for path in paths for start in _starts(path)}
        ends |= _EXPERT_NAMES if converts_experts(model) else set()
        missing = [name for name in asked if name not in ends]
    _refuse_missing(missing, linear_names(model), settings)


def check_stored_targets(stored: dict[str, tuple[int, ...]], settings: AdapterSettings) -> None:
    """Raise what `check_targets` does, from the names a base's weights are stored under, where these leave no doubt.

    Plain names of a model without experts do; patterns and paths wait for the model, whose paths may be others.
    """
    asked = asked_targets(settings)
    if (
        asked is None
        or isinstance(asked, str)
        or any("." in name for name in asked)
        or any("expert" in path for path in stored)
    ):
        return
    names = {path.rpartition(".")[2] for path in stored}
    if stored:
        linear = {path.rpartition(".")[2] for path, shape in stored.items() if len(shape) == 2}
        _refuse_missing([name for name in asked if name not in names], linear - _NOT_ADAPTED, settings)


def _refuse_missing(missing: list[str], linear: Iterable[str], settings: AdapterSettings) -> None:
    if missing:
        group = "lora" if isinstance(settings, LoraSettings) else "peft"
        linear_modules = sorted(set(linear))
        hint = nearest(missing[0], linear_modules)
        listed = f" Its linear modules: {', '.join(linear_modules)}." if "known:" not in hint else ""
        raise UsageError(
            f"{group}.target_modules: {', '.join(missing)} asked; the model has no such module;{hint}{listed} "
            f"Or write {ALL_LINEAR}"
        )


def linear_names(model: Any) -> Iterator[str]:
    """Yield the last part of the path of every linear module except the heads and the routers of experts."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    routers = tuple(f"{path}." for path, module in model.named_modules() if _is_router(module))
    adapters = adapter_modules(model)
    for path, module in model.named_modules():
        within_adapter = id(module) in adapters or path.endswith(".base_layer")
        within_router = path.startswith(routers)
        if is_linear(module) and id(module) not in heads and not within_adapter and not within_router:
            yield path.rpartition(".")[2]


def adapter_modules(model: Any) -> set[int]:
    """Return the ids of the modules that adapters have brought into a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = (getattr(layer, name) for layer in layers for name in layer.adapter_layer_names)
    return {id(module) for part in parts if hasattr(part, "modules") for module in part.modules()}


def is_linear(module: Any) -> bool:
    """Return whether a module multiplies with a matrix: torch's Linear, a quantized one, or GPT-2's Conv1D."""
    name = type(module).__name__
    return "Linear" in name or name == "Conv1D"


def has_fused_experts(model: Any) -> bool:
    """Return whether a model holds the weights of its experts as parameters of three dimensions.

    Convolutions, gates and time mixing of hybrid models have such parameters too; experts say so in their class.
    """
    return any("Expert" in type(module).__name__ and _has_stacked_weight(module) for module in model.modules())


def converts_experts(model: Any) -> bool:
    """Return whether PEFT takes names of linear modules of this model for its fused experts."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=sorted(_EXPERT_NAMES))
    convert_peft_config_for_transformers(config, model, None)
    return bool(config.target_parameters)


def _has_stacked_weight(module: Any) -> bool:
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def _is_router(module: Any) -> bool:
    """Return whether a module chooses experts: its class is named Router or Gating."""
    return any(word in type(module).__name__ for word in ("Router", "Gating"))


def is_transposed(model: Any) -> bool:
    """Return whether a model's layers hold (inputs, outputs), as GPT-2's do."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _starts(path: str) -> Iterator[int]:
    yield 0
    yield from (index + 1 for index, letter in enumerate(path) if letter == ".")
