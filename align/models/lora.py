"""What a LoRA adapter is set on: the modules that are there, those asked for, and PEFT's configuration for them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError, nearest, shorten
from align.models.patterns import check_patterns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from peft import LoraConfig

    from align.config import LoraSettings
    from align.registry import Checkpoint

ALL_LINEAR = "all-linear"

_EXPERT_NAMES = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""Names that PEFT 0.21 takes for experts and their router, wherever they stand, in the models it converts."""

_RAW_WEIGHT_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_RAW_WEIGHT_NAMES = {"out_proj", "conv1d"}
"""PEFT 0.21 refuses these modules of these models: their kernels read the weight itself, past any adapter."""

_NOT_ADAPTED = {"embed_tokens", "embed_positions", "embed_in", "embed_out", "wte", "wpe", "lm_head", "score"}
"""Stored matrices that are no linear layers inside the model."""


def lora_arguments(lora: LoraSettings) -> dict[str, Any]:
    """Our LoRA settings under PEFT's names."""
    return {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
    }


def new_config(model: Any, lora: LoraSettings, task: str = "CAUSAL_LM") -> LoraConfig:
    """PEFT's configuration of a new adapter on `model`.

    `all-linear` is PEFT's: every linear module except the head. In a mixture of experts the experts are fused
    parameters and no modules; they and their router stay frozen, because PEFT would build the full update of every
    expert in each pass and could neither run adapters side by side in a batch nor apply DoRA or dropout. Naming the
    experts' modules (`gate_proj`, `up_proj` and `down_proj` together, `w1`, `w2` and `w3` in Mixtral) adapts them all
    the same in the models that PEFT converts.

    Raises UsageError with the model's linear modules when a module that was asked for is not there.
    """
    from peft import LoraConfig

    check_targets(model, lora)
    arguments = lora_arguments(lora)
    if lora.target_modules == ALL_LINEAR:
        arguments["target_modules"] = all_linear(model)
    return LoraConfig(**arguments, task_type=task, fan_in_fan_out=_is_transposed(model))


def all_linear(model: Any) -> str | list[str]:
    """Return PEFT's `all-linear`, or the names it stands for where some must be left out."""
    left_out = {name for name in _EXPERT_NAMES if converts_experts(model)}
    left_out |= _RAW_WEIGHT_NAMES if model.config.model_type in _RAW_WEIGHT_MODELS else set()
    if left_out or has_fused_experts(model):
        return sorted(set(linear_names(model)) - left_out)
    return ALL_LINEAR


def saved_config(model: Any, checkpoint: Checkpoint, task: str | None = "CAUSAL_LM", *, trainable: bool) -> LoraConfig:
    """PEFT's configuration of a saved adapter, for attaching it to `model`; a score head is left to the caller.

    Raises IntegrityError when the adapter's config is not one of PEFT's.
    """
    from peft import LoraConfig

    try:
        with warnings.catch_warnings():
            # It warns of settings that are there but off; those that are on were refused by name.
            warnings.simplefilter("ignore")
            config = LoraConfig.from_pretrained(checkpoint.location)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        raise IntegrityError(
            f"{checkpoint.reference}: PEFT cannot read its adapter_config.json ({shorten(str(error), 120)}); copy or "
            "train the adapter again"
        ) from None
    check_patterns(model, config, checkpoint.reference)
    config.task_type, config.inference_mode = task, not trainable
    config.modules_to_save = None if checkpoint.kind == "reward" else config.modules_to_save
    config.fan_in_fan_out = _is_transposed(model)
    config.base_model_name_or_path = None  # where its base was; PEFT warns when that is elsewhere now
    return config


def insert(model: Any, config: LoraConfig, name: str) -> Any:
    """`model` with a new adapter of that name in it: a PeftModel, the same one if it is one already."""
    from peft import PeftModel, get_peft_model

    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    model.add_adapter(name, config)
    return model


def check_targets(model: Any, lora: LoraSettings) -> None:
    """Raise UsageError with the model's linear modules unless every module asked for is there."""
    import re

    asked = lora.target_modules
    if asked == ALL_LINEAR:
        return
    paths = [path for path, module in model.named_modules() if path]
    if isinstance(asked, str):
        missing = [] if any(re.fullmatch(asked, path) for path in paths) else [asked]
    else:
        ends = {path[start:] for path in paths for start in _starts(path)}
        ends |= _EXPERT_NAMES if converts_experts(model) else set()
        missing = [name for name in asked if name not in ends]
    _refuse(missing, linear_names(model))


def check_stored_targets(stored: dict[str, tuple[int, ...]], lora: LoraSettings) -> None:
    """What `check_targets` raises, from the names a base's weights are stored under, where these leave no doubt.

    Plain names of a model without experts do; patterns and paths wait for the model, whose paths may be others.
    """
    asked = lora.target_modules
    if isinstance(asked, str) or any("." in name for name in asked) or any("expert" in path for path in stored):
        return
    names = {path.rpartition(".")[2] for path in stored}
    if stored:
        linear = {path.rpartition(".")[2] for path, shape in stored.items() if len(shape) == 2}
        _refuse([name for name in asked if name not in names], linear - _NOT_ADAPTED)


def _refuse(missing: list[str], linear: Iterable[str]) -> None:
    if missing:
        known = sorted(set(linear))
        hint = nearest(missing[0], known)
        listed = f" Its linear modules: {', '.join(known)}." if "known:" not in hint else ""
        raise UsageError(
            f"lora.target_modules: {', '.join(missing)} asked; the model has no such module;{hint}{listed} "
            f"Or write {ALL_LINEAR}"
        )


def linear_names(model: Any) -> Iterator[str]:
    """The last part of the path of every linear module except the heads and the routers of experts."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    routers = tuple(f"{path}." for path, module in model.named_modules() if _is_router(module))
    for path, module in model.named_modules():
        within_adapter = ".lora_" in path or path.endswith(".base_layer")
        within_router = path.startswith(routers)
        if is_linear(module) and id(module) not in heads and not within_adapter and not within_router:
            yield path.rpartition(".")[2]


def is_linear(module: Any) -> bool:
    """Whether a module multiplies with a matrix: torch's Linear, a quantized one, or the Conv1D of GPT-2."""
    name = type(module).__name__
    return "Linear" in name or name == "Conv1D"


def has_fused_experts(model: Any) -> bool:
    """Whether a model holds the weights of its experts as parameters of three dimensions.

    Convolutions, gates and time mixing of hybrid models have such parameters too; experts say so in their class.
    """
    return any("Expert" in type(module).__name__ and _has_stacked_weight(module) for module in model.modules())


def converts_experts(model: Any) -> bool:
    """Whether PEFT takes names of linear modules of this model for its fused experts."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=sorted(_EXPERT_NAMES))
    convert_peft_config_for_transformers(config, model, None)
    return bool(config.target_parameters)


def _has_stacked_weight(module: Any) -> bool:
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def _is_router(module: Any) -> bool:
    """Whether a module chooses experts: by its class, which transformers names Router or Gating."""
    return any(word in type(module).__name__ for word in ("Router", "Gating"))


def _is_transposed(model: Any) -> bool:
    """Whether its layers hold (inputs, outputs), as GPT-2's do; PEFT wants to know."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _starts(path: str) -> Iterator[int]:
    yield 0
    yield from (index + 1 for index, letter in enumerate(path) if letter == ".")
