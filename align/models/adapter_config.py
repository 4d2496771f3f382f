"""PEFT's configuration of an adapter, a new one's or a saved one's: the modules it is set on, and setting it there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from align.config import AdapterSettings, LoraSettings
from align.errors import IntegrityError, UsageError, nearest, shorten
from align.models.adapter_kinds import check_patterns
from align.models.quiet_libraries import without_optional
from align.registry import Checkpoint
from align.tuners import LORA, OWN_TARGETS, tuner_type

if TYPE_CHECKING:
    from peft import PeftConfig

ALL_LINEAR = "all-linear"

_EXPERT_NAMES = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""Names that PEFT 0.21 takes for experts and their router, wherever they stand, in the models it converts."""

_RAW_WEIGHT_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_RAW_WEIGHT_NAMES = {"out_proj", "conv1d"}
"""PEFT 0.21 refuses these modules of these models: their kernels read the weight itself, past any adapter."""

_NOT_ADAPTED = {"embed_tokens", "embed_positions", "embed_in", "embed_out", "wte", "wpe", "lm_head", "score"}
"""Stored matrices that are no linear layers inside the model."""

_OWNED = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
"""what align says itself in every adapter's configuration"""


def new_config(model: Any, settings: AdapterSettings, task: str = "CAUSAL_LM") -> PeftConfig:
    """Return PEFT's configuration of a new adapter on `model`, or UsageError with its linear modules or PEFT's reason.

    `all-linear` is PEFT's: every linear module except the head. In a mixture of experts the experts are fused
    parameters and no modules; they and their router stay frozen, because PEFT would build the full update of every
    expert in each pass and could neither run adapters side by side in a batch nor apply DoRA or dropout. Naming the
    experts' modules (`gate_proj`, `up_proj` and `down_proj` together, `w1`, `w2` and `w3` in Mixtral) adapts them all
    the same in the models that PEFT converts.
    """
    check_targets(model, settings)
    arguments = _arguments(settings)
    if asked_targets(settings) == ALL_LINEAR:
        arguments["target_modules"] = all_linear(model)
    config_class = _config_class(arguments.pop("peft_type"))
    if "fan_in_fan_out" in {field.name for field in fields(config_class)}:
        arguments.setdefault("fan_in_fan_out", is_transposed(model))
    with explain_settings(settings):
        return config_class(**arguments, task_type=task)


def _arguments(settings: AdapterSettings) -> dict[str, Any]:
    """Return our settings of a new adapter under PEFT's names."""
    if isinstance(settings, LoraSettings):
        renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
        return {"peft_type": LORA} | {renamed.get(key, key): value for key, value in settings}
    from peft.tuners.lora import config

    nested = {key: getattr(config, name)(**settings[key]) for key, name in _NESTED.items() if settings.get(key)}
    start = settings.get("init_lora_weights")
    if (key := f"{start}_config") in _NESTED:
        nested.setdefault(key, getattr(config, _NESTED[key])())
    if start == "loftq":
        nested["loftq_config"] = settings.get("loftq_config") or {"loftq_bits": 4}
    return {**settings, "peft_type": tuner_type(settings), **nested}


_NESTED = {"eva_config": "EvaConfig", "corda_config": "CordaConfig", "lora_ga_config": "LoraGAConfig"}


def _config_class(tuner: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[tuner]


@contextmanager
def explain_settings(settings: AdapterSettings) -> Iterator[None]:
    """Turn what PEFT raises about the settings of a new adapter into a UsageError."""
    group = "lora" if isinstance(settings, LoraSettings) else "peft"
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{group}: {reason}; correct the settings under {group}") from None


def check_peft_names(settings: dict[str, Any]) -> None:
    """Raise UsageError for a key under `peft` that PEFT's configuration of that tuner does not have."""
    config_class = _config_class(tuner_type(settings))
    names = [field.name for field in fields(config_class) if field.init and field.name not in _OWNED]
    for key in settings:
        if key in _OWNED:
            raise UsageError(f"peft.{key}: this is set by align itself, a run depends on it; remove it")
        if key not in names:
            raise UsageError(f"peft.{key}: no such setting of {config_class.__name__};{nearest(key, names)}")


def saved_config(model: Any, checkpoint: Checkpoint, task: str | None = "CAUSAL_LM", *, trainable: bool) -> PeftConfig:
    """Return PEFT's configuration of a saved adapter, to attach it to `model` without its score head."""
    from peft import PeftConfig

    try:
        with warnings.catch_warnings():
            # It warns of settings that are there but off; those that are on were refused by name.
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(checkpoint.location)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        raise IntegrityError(
            f"{checkpoint.reference}: PEFT cannot read its adapter_config.json ({shorten(str(error), 120)}); copy or "
            "train the adapter again"
        ) from None
    check_patterns(model, config, checkpoint.reference)
    config.task_type, config.inference_mode = task, not trainable
    if checkpoint.kind == "reward" and hasattr(config, "modules_to_save"):
        config.modules_to_save = None
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = is_transposed(model)
    config.base_model_name_or_path = None  # where its base was; PEFT warns when that is elsewhere now
    return config


def insert_adapter(model: Any, config: PeftConfig, name: str) -> Any:
    """Return `model` with a new adapter of that name in it: a PeftModel, the same one if it is one already."""
    from peft import PeftModel, get_peft_model

    with without_optional("bitsandbytes"):  # a quantized base has imported it
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
    return model


def set_trainable(model: Any, name: str, trainable: bool) -> None:
    """Switch the gradients of one adapter on or off, whichever adapter is active."""
    if trainable:
        model.set_requires_grad(name)  # PEFT knows which of its tensors stay as they are
    else:
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(False)


def adapter_parameters(model: Any, name: str) -> Iterator[Any]:
    """Yield the parameters of one adapter."""
    return (parameter for key, parameter in model.named_parameters() if f".{name}." in key or key.endswith(f".{name}"))


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


def describe_left_out(model: Any, settings: AdapterSettings) -> str | None:
    """Return which linear modules a new adapter on `all-linear` is not set on, as a line; None when it is on all."""
    if asked_targets(settings) != ALL_LINEAR or (chosen := all_linear(model)) == ALL_LINEAR:
        return None
    names, left_out = ", ".join(chosen), ", ".join(sorted(set(linear_names(model)) - set(chosen)))
    if not has_fused_experts(model):
        return f"{names} are adapted; PEFT cannot adapt {left_out} of this architecture"
    also = f", and so do dense layers whose names PEFT takes for experts ({left_out})" if left_out else ""
    return f"a mixture of experts; {names} are adapted, experts and router stay as they are{also}"


def check_targets(model: Any, settings: AdapterSettings) -> None:
    """Raise UsageError with the model's linear modules unless every module asked for is there."""
    asked = asked_targets(settings)
    if asked == ALL_LINEAR or not asked:
        return
    paths = [path for path, module in model.named_modules() if path]
    if isinstance(asked, str):
        missing = [] if any(re.fullmatch(asked, path) for path in paths) else [asked]
    else:
        plain = set(asked) - (_EXPERT_NAMES if converts_experts(model) else set())
        missing = [each for each in asked if each in plain and not any(f".{p}".endswith(f".{each}") for p in paths)]
    _refuse_missing(missing, linear_names(model), settings)


def check_stored_targets(stored: dict[str, tuple[int, ...]], settings: AdapterSettings) -> None:
    """Raise what `check_targets` does, from the names a base's weights are stored under, where these leave no doubt.

    Plain names of a model without experts do; patterns and paths wait for the model, whose paths may be others.
    """
    asked = asked_targets(settings)
    if not stored or not isinstance(asked, list) or any("expert" in path for path in stored):
        return
    if not any("." in name for name in asked):
        names = {path.rpartition(".")[2] for path in stored}
        linear = {path.rpartition(".")[2] for path, shape in stored.items() if len(shape) == 2} - _NOT_ADAPTED
        _refuse_missing([name for name in asked if name not in names], linear, settings)


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
    kinds = ((path, type(module).__name__) for path, module in model.named_modules())
    routers = tuple(f"{path}." for path, kind in kinds if "Router" in kind or "Gating" in kind)
    left_out = heads | adapter_modules(model)
    for path, module in model.named_modules():
        inside = path.startswith(routers) or path.endswith(".base_layer")
        if is_linear(module) and id(module) not in left_out and not inside:
            yield path.rpartition(".")[2]


def adapter_modules(model: Any) -> set[int]:
    """Return the ids of the modules that adapters have brought into a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
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
    experts = (module for module in model.modules() if "Expert" in type(module).__name__)
    return any(parameter.ndim == 3 for module in experts for parameter in module.parameters(recurse=False))


def converts_experts(model: Any) -> bool:
    """Return whether PEFT takes names of linear modules of this model for its fused experts."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=sorted(_EXPERT_NAMES))
    convert_peft_config_for_transformers(config, model, None)
    return bool(config.target_parameters)


def is_transposed(model: Any) -> bool:
    """Return whether a model's layers hold (inputs, outputs), as GPT-2's do."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
