"""PEFT's configuration of an adapter, a new one's or a saved one's, and setting it on a model."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from align.config import LoraSettings
from align.errors import IntegrityError, UsageError, nearest, shorten
from align.models.patterns import check_patterns
from align.models.target_modules import ALL_LINEAR, all_linear, asked_targets, check_targets, is_transposed
from align.tuners import LORA, tuner_type

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftConfig

    from align.config import AdapterSettings
    from align.registry import Checkpoint

_OWNED = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
"""what align says itself in every adapter's configuration"""


def new_config(model: Any, settings: AdapterSettings, task: str = "CAUSAL_LM") -> PeftConfig:
    """Return PEFT's configuration of a new adapter on `model`.

    `all-linear` is PEFT's: every linear module except the head. In a mixture of experts the experts are fused
    parameters and no modules; they and their router stay frozen, because PEFT would build the full update of every
    expert in each pass and could neither run adapters side by side in a batch nor apply DoRA or dropout. Naming the
    experts' modules (`gate_proj`, `up_proj` and `down_proj` together, `w1`, `w2` and `w3` in Mixtral) adapts them all
    the same in the models that PEFT converts.

    Raises UsageError with the model's linear modules when a module that was asked for is not there, and with PEFT's
    own reason for a value that PEFT does not take.
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
    if not isinstance(settings, LoraSettings):
        nested = {key: _nested_class(key)(**value) for key, value in settings.items() if key in _NESTED and value}
        if nested_key := _NESTED_BY_START.get(str(settings.get("init_lora_weights"))):
            nested.setdefault(nested_key, _nested_class(nested_key)())
        if settings.get("init_lora_weights") == "loftq":
            nested["loftq_config"] = settings.get("loftq_config") or {"loftq_bits": 4}
        return {**settings, "peft_type": tuner_type(settings), **nested}
    return {
        "peft_type": LORA,
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "target_modules": settings.target_modules,
    }


_NESTED = {"eva_config": "EvaConfig", "corda_config": "CordaConfig", "lora_ga_config": "LoraGAConfig"}
_NESTED_BY_START = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}


def _nested_class(key: str) -> Any:
    from peft.tuners.lora import config

    return getattr(config, _NESTED[key])


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
    """Return PEFT's configuration of a saved adapter, for attaching it to `model`; a score head is left to the caller.

    Raises IntegrityError when the adapter's config is not one of PEFT's.
    """
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
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = None if checkpoint.kind == "reward" else config.modules_to_save
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = is_transposed(model)
    config.base_model_name_or_path = None  # where its base was; PEFT warns when that is elsewhere now
    return config


def insert_adapter(model: Any, config: PeftConfig, name: str) -> Any:
    """Return `model` with a new adapter of that name in it: a PeftModel, the same one if it is one already."""
    from peft import PeftModel, get_peft_model

    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    model.add_adapter(name, config)
    return model


def set_trainable(model: Any, name: str, trainable: bool) -> None:
    """Switch the gradients of one adapter on or off, whichever adapter is active."""
    if trainable:
        model.set_requires_grad(name)  # PEFT knows which of its tensors stay as they are
        return
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)


def adapter_parameters(model: Any, name: str) -> Iterator[Any]:
    """Yield the parameters of one adapter."""
    return (parameter for key, parameter in model.named_parameters() if f".{name}." in key or key.endswith(f".{name}"))
