"""The file an adapter is kept in: read with proof that it is whole, and that it fits its base and does something."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, shorten
from align.models.adapter_config import insert_adapter, saved_config
from align.models.adapter_kinds import AdapterUse, check_usable, read_adapter_settings, read_trained_tokens
from align.models.lora_starts import plain_config, plain_state
from align.models.probes import probe_logits
from align.registry import Checkpoint
from align.tuners import LORA, Ability, require, tuner_type

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS = "adapter_model.safetensors"
_HEAD = ".score."
_UPDATE = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "base_layer", "score")


def read_adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a saved adapter's tensors without its score head, if the file is what was committed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(checkpoint.location) / WEIGHTS
    checkpoint.check(hashes=True)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path}: the adapter cannot be read ({error}); copy or train it again") from None
    if broken := [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise IntegrityError(
            f"{checkpoint.reference}: {len(broken)} of its tensors are not finite (NaN or infinite), first "
            f"{broken[0]}; train it again"
        )
    state = {key: tensor for key, tensor in state.items() if _HEAD not in key}
    settings = read_adapter_settings(checkpoint)
    if tuner_type(settings) == LORA:  # a rank that no tensor has would be allocated before they are compared
        announced = max([settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()])
        factors = [tensor.shape for key, tensor in state.items() if "lora_A" in key or "lora_embedding_A" in key]
        highest = max((shape[0] for shape in factors if len(shape)), default=0)
        if announced > highest and not (settings.get("target_parameters") and highest):
            raise IntegrityError(
                f"{checkpoint.reference}: its config announces rank {announced}, its tensors have {highest} at most; "
                "adapter_config.json and weights are not of one adapter"
            )
    return state


def insert_saved(
    model: Any,
    checkpoint: Checkpoint,
    name: str,
    use: AdapterUse,
    task: str | None = "CAUSAL_LM",
    score: Callable[[Any], Any] | None = None,
) -> Any:
    """Return `model` with a saved adapter in it under `name`: a PeftModel that computes what plain PEFT computes.

    `score` gives the weight of the score head, from the state of the fresh adapter, where there is one. Raises
    IntegrityError when the adapter cannot be used so, is not whole, or does not fit the model.
    """
    from peft import set_peft_model_state_dict

    check_usable(checkpoint, use)
    config = saved_config(model, checkpoint, task, trainable=use == "train")
    state = read_adapter(checkpoint)
    _check_place(model, config, state, checkpoint)
    written, config = config, plain_config(config)
    if config.peft_type == LORA:
        config.init_lora_weights = True
    if score is not None:
        config.modules_to_save = ["score"]
    model = _insert(model, config, name, checkpoint)
    if config is not written:
        state = plain_state(model, name, written, state, checkpoint)
    if score is not None:
        fresh = adapter_state(model, name)
        (key,) = (key for key in fresh if key.endswith("score.weight"))
        state[key] = score(fresh[key])
    check_state(model, state, name, checkpoint)
    set_peft_model_state_dict(model, state, adapter_name=name)
    if config.peft_type != LORA and _is_dead(model, name):
        raise IntegrityError(f"{checkpoint.reference}: the model answers the same without it; train it again")
    return model


def _insert(model: Any, config: PeftConfig, name: str, checkpoint: Checkpoint) -> Any:
    try:
        with warnings.catch_warnings():
            # On tied embeddings that an adapter sets apart: they are served as PEFT serves them, and merged apart.
            warnings.filterwarnings("ignore", message=".*(tied|tie_word_embeddings|lora_bias)")
            return insert_adapter(model, config, name)
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError, re.error) as error:
        raise IntegrityError(
            f"{checkpoint.reference}: PEFT cannot set it on its base ({shorten(str(error), 160)}); it was made for "
            "another model, or its adapter_config.json is damaged"
        ) from error


def _is_dead(model: Any, name: str) -> bool:
    """Return whether an adapter, of a tuner whose tensors do not tell, leaves every logit as it was."""
    before = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    same = probe_logits(model).equal(probe_logits(model, bare=True))
    model.set_adapter(before, inference_mode=model.peft_config[before].inference_mode)
    return same


def _check_place(model: Any, config: PeftConfig, state: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise UsageError where PEFT cannot set an adapter on this base, IntegrityError where it cannot beside others."""
    formats: dict[str, Ability] = {"is_loaded_in_4bit": "nf4", "is_loaded_in_8bit": "int8"}
    for attribute, quantization in formats.items():
        if getattr(model, attribute, False):
            require(config.peft_type.value, quantization, checkpoint.reference, "use quantization=none")
    if not (others := getattr(model, "peft_config", {}).values()):
        return
    if tuners := {str(other.peft_type.value) for other in others} - {config.peft_type}:
        raise IntegrityError(
            f"{checkpoint.reference}: an adapter of the tuner {config.peft_type.value} beside one of "
            f"{', '.join(tuners)}; PEFT holds one tuner a base; use them apart"
        )
    if any(read_trained_tokens(each) for each in (config, *others)):  # PEFT 0.21 mixes them up
        raise IntegrityError(
            f"{checkpoint.reference}: an adapter with trained tokens (trainable_token_indices) cannot stand beside "
            "other adapters; use it with its base alone, or merge it with align registry merge"
        )
    # One adapter may not hold a trained copy of a module that another one is set on.
    copied = {name for each in others for name in _copied_modules(each)} - {"score"}
    shared = _path_parts(key.partition(".lora_")[0] for key in state if ".lora_" in key) & copied
    adapted = _path_parts(path for path, module in model.named_modules() if hasattr(module, "lora_A"))
    if shared := shared | (adapted & _copied_modules(config)):
        raise IntegrityError(
            f"{checkpoint.reference}: it and an adapter beside it meet in {', '.join(sorted(shared))}, of which one "
            "holds a trained copy (modules_to_save); load one of them at a time, or merge it"
        )


def _copied_modules(config: PeftConfig) -> set[str]:
    return {name.rpartition(".")[2] for name in getattr(config, "modules_to_save", None) or ()}


def _path_parts(paths: Iterable[str]) -> set[str]:
    return {part for path in paths for part in path.split(".")}


def adapter_state(model: Any, name: str) -> dict[str, Any]:
    """Return the tensors of an adapter of a model under their names in a file."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        # That it saves embeddings which an adapter is set on: so it does in the file.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        # On matrices without rows: AdaLoRA gives some layers rank 0.
        warnings.filterwarnings("ignore", message=r"(?s).*have invalid shape")
        return dict(get_peft_model_state_dict(model, adapter_name=name))


def check_state(model: Any, state: dict[str, Any], name: str, checkpoint: Checkpoint) -> None:
    """Raise IntegrityError when a tensor is missing, too much or of another shape, or when the adapter does nothing.

    The model with adapter `name` may be shapes without storage.
    """
    fresh = adapter_state(model, name)
    expected = {key: tuple(tensor.shape) for key, tensor in fresh.items()}
    stored = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key))
    for key in (key for key in wrong if key not in expected):
        module = key.removesuffix(".weight").rpartition(".")[2]
        if module in ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out"):
            raise IntegrityError(
                f"{checkpoint.reference}: it holds a {module} of its own with {stored[key][0]} rows (tokens were added "
                "to the base it was trained on), and its config does not name it in modules_to_save; use the base with "
                "those tokens, or merge it where it was trained"
            )
    if wrong:
        key = wrong[0]
        raise IntegrityError(
            f"{checkpoint.reference}: {len(wrong)} of {len(expected)} adapter tensors do not fit its base, first {key} "
            f"(expected {expected.get(key)}, found {stored.get(key)}); the file is incomplete or of another model"
        )
    for key in (key for key in state if key.endswith(".base_layer.weight") and not fresh[key].is_meta):
        if not fresh[key].float().cpu().allclose(state[key].float(), rtol=1e-2, atol=1e-4):
            raise IntegrityError(
                f"{checkpoint.reference}: its copy of the base's {key.removesuffix('.base_layer.weight')} is not what "
                "this base has; it would replace it for every model; use the base it was trained on"
            )
    if model.peft_config[name].peft_type == LORA and not _is_live(state, fresh):
        raise IntegrityError(f"{checkpoint.reference}: every lora_B is zero, so it changes nothing; train it again")


def _is_live(state: dict[str, Any], fresh: dict[str, Any]) -> bool:
    """Return whether an adapter changes the base: by an update that is not zero, or by DoRA's magnitudes.

    What is no update of two matrices (a bias, a trained token, a copy of a module) does something by itself.
    """
    for key in (key for key, tensor in state.items() if bool(tensor.any())):
        partner = key.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")
        is_update = partner != key and not key.endswith(".bias")
        if is_update and (partner not in state or bool(state[partner].any())):
            return True
        if key.endswith(".bias") or not any(part in key for part in _UPDATE):
            return True
    return any(
        fresh[key].is_meta or not state[key].float().allclose(fresh[key].float().cpu(), rtol=1e-4)
        for key in state
        if "lora_magnitude_vector" in key
    )
