"""The kinds of adapter that PEFT writes: which are used as they are, converted, used in some places only, or refused.

A setting of LoRA that is not listed here changes what an adapter computes in a way that nobody has proved on logits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from align.data.bounded_process import AVAILABLE, BoundedProcess, ProcessEnded
from align.errors import IntegrityError, UsageError, shorten
from align.registry import Checkpoint
from align.registry.fingerprints import read_json
from align.tuners import LORA, Ability, find_obstacle, tuner_type

AdapterUse = Literal["serve", "train", "merge"]
_ABILITIES: dict[AdapterUse, Ability] = {"serve": "train", "train": "continue", "merge": "merge"}

CONVERTED = ("pissa", "olora")
"""starts that take a part out of the base, and that can be computed again from the base"""
TAKES_FROM_BASE = ("pissa", "olora", "corda", "lora_ga")
"""how the names of all starts begin that take a part out of the base"""
NO_PRODUCT = ("use_dora", "lora_bias", "target_parameters", "alora_invocation_tokens")
"""settings of an adapter that make it more than a product of two matrices"""

_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_UNDERSTOOD = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "target_parameters", "trainable_token_indices", "ensure_weight_tying", "lora_bias", "init_lora_weights",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
}  # fmt: skip

_SELDOM = {
    "layer_replication": "it copies layers of the base, which the other models share",
    "alora_invocation_tokens": "an activated LoRA, which acts from its invocation tokens on only",
}

_PLAIN_NAME = re.compile(r"[\w.-]*")
_PATTERN_SECONDS = 1
"""computing time for all patterns of an adapter; those in use take milliseconds"""
_PATTERN_MEMORY = 1 << 30
_LONGEST_PATTERNS = 20_000

_WHOLE = "merge it (align registry merge) and go on from the whole model"
_CONVERT = "convert it where it was trained: save_pretrained(DIR, path_initial_model_for_weight_conversion=START)"


def read_adapter_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings in an adapter's config file."""
    return read_json(Path(checkpoint.location) / "adapter_config.json", required=True)


def check_usable(checkpoint: Checkpoint, use: AdapterUse) -> None:
    """Raise IntegrityError, with the reason and a way out, when an adapter cannot be used so with right numbers."""
    settings, name = read_adapter_settings(checkpoint), checkpoint.reference
    tuner = tuner_type(settings)
    if tuner == LORA:
        _check_lora(settings, name)
    if reason := find_obstacle(tuner, _ABILITIES[use]):
        raise IntegrityError(f"{name}: an adapter of the tuner {tuner}, which cannot be used so: {reason}; {_WHOLE}")
    if use in ("serve", "train") and settings.get("bias", "none") != "none":
        raise IntegrityError(
            f"{name}: bias={settings['bias']}: it replaces biases of the base, which the other models share; {_WHOLE}"
        )
    beside = {*(settings.get("modules_to_save") or ())} - {"score", "classifier"}
    if checkpoint.kind == "reward" and beside:
        raise IntegrityError(
            f"{name}: a reward model with trained modules beside its adapter ({', '.join(sorted(beside))}), which is "
            "not supported; train one with align reward"
        )
    if use == "train":
        _check_trainable(settings, name, checkpoint.kind == "reward")


def _check_lora(settings: dict[str, Any], name: str) -> None:
    """Raise IntegrityError for settings of LoRA that are not known to be computed right."""
    for key, why in _unknown(settings):
        raise IntegrityError(f"{name}: an adapter with {key} ({why}); use PEFT itself for it, or train plain LoRA")
    _check_numbers(settings, name)
    start = settings.get("init_lora_weights", True)
    if start not in (*_HARMLESS_STARTS, *CONVERTED):
        raise IntegrityError(
            f"{name}: it started as {shorten(start)}, which took a part out of its base, and that part cannot be "
            f"computed again from here; {_CONVERT}"
        )


def _unknown(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings of LoRA that nobody has proved here, each with what it is."""
    for key in sorted(key for key, value in settings.items() if value and key not in _UNDERSTOOD):
        yield key, _SELDOM.get(key, "a variant of LoRA that is not supported")


def check_new_settings(settings: dict[str, Any], quantization: str) -> None:
    """Raise UsageError for settings under `peft` with which a new adapter could not be trained or used afterwards."""
    if tuner_type(settings) == LORA:
        for key, variant in _unknown(settings):
            raise UsageError(f"peft.{key}: {variant}")
        start, rounding = str(settings.get("init_lora_weights", True)), f"quantization={quantization}"
        takes_from_base = start.startswith(TAKES_FROM_BASE)
        why = ""
        if takes_from_base and (mixed := [key for key in NO_PRODUCT if settings.get(key)]):
            why = f"is saved as plain LoRA over the untouched base, which {mixed[0]} does not allow; remove one of them"
        elif takes_from_base and quantization != "none":
            why = f"is computed from the base's weights, which {rounding} rounds; give quantization=none"
        elif start == "loftq" and quantization != "nf4":
            why = f"makes up for the rounding of a base in nf4, found {rounding}; give quantization=nf4"
        if why:
            raise UsageError(f"peft.init_lora_weights={start}: it {why}")
    if settings.get("bias", "none") != "none":
        raise UsageError("peft.bias: trained biases replace those of the base, which other models share; remove it")


def _check_trainable(settings: dict[str, Any], name: str, is_reward: bool) -> None:
    """Raise IntegrityError for an adapter that is more than the low-rank updates that training goes on with."""
    beside = [] if is_reward else settings.get("modules_to_save") or []
    start = settings.get("init_lora_weights")
    reasons = {
        f"its start ({start}) took a part out of the base": start in CONVERTED,
        f"it holds trained copies of {', '.join(map(str, beside))}": beside,
        "it holds trained token embeddings": settings.get("trainable_token_indices"),
        "its embeddings and head are tied": settings.get("ensure_weight_tying"),
    }
    for why in (reason for reason, holds in reasons.items() if holds):
        raise IntegrityError(f"{name}: it can be served and merged, but not trained on, because {why}; {_WHOLE}")


def _check_numbers(settings: dict[str, Any], name: str) -> None:
    """Raise IntegrityError unless ranks are whole numbers above 0 and scales are finite."""
    by_rank, by_alpha = (settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    if not (isinstance(by_rank, dict) and isinstance(by_alpha, dict)):
        raise IntegrityError(f"{name}: its rank_pattern or alpha_pattern is no table; copy adapter_config.json again")
    ranks = [settings.get("r", 8), *by_rank.values()]
    scales = [settings.get("lora_alpha", 8), *by_alpha.values()]
    if wrong := [rank for rank in ranks if type(rank) is not int or rank < 1]:
        raise IntegrityError(f"{name}: its rank is {shorten(wrong[0])}; copy adapter_config.json again")
    if wrong := [value for value in scales if not isinstance(value, int | float) or not math.isfinite(value)]:
        raise IntegrityError(f"{name}: its lora_alpha is {shorten(wrong[0])}; copy adapter_config.json again")


def read_trained_tokens(config: Any) -> list[int]:
    """Return the ids of the tokens whose embeddings an adapter has trained one by one."""
    tokens = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    groups = tokens.values() if isinstance(tokens, dict) else [tokens]
    return sorted({int(token) for group in groups for token in group})


def check_patterns(model: Any, config: Any, name: str) -> None:
    """Raise IntegrityError when comparing a config's patterns with a model's module names would not end soon.

    A regular expression cannot be interrupted, so a process of its own tries it first, on the names it will meet.
    """
    patterns = list(_patterns(config))
    if not patterns:
        return
    why = f"has more than {_LONGEST_PATTERNS} characters" if sum(map(len, patterns)) > _LONGEST_PATTERNS else ""
    if not why and AVAILABLE:
        paths = [path.removeprefix("base_model.model.") for path, _ in model.named_modules()]
        process = BoundedProcess("align.models.adapter_kinds:compare", _PATTERN_SECONDS, _PATTERN_MEMORY)
        try:
            process.ask(json.dumps([patterns, paths]).encode())
        except ProcessEnded as error:
            why = str(error)
        finally:
            process.close()
    if why:
        raise IntegrityError(
            f"{name}: its modules are told by a pattern ({shorten(max(patterns, key=len))}) that takes too long to "
            f"compare with their names: it {why}; list the names in adapter_config.json"
        )


def compare(request: bytes) -> bytes:
    """Compare patterns with names, and answer nothing; runs in the process of `check_patterns`."""
    patterns, names = json.loads(request)
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            continue  # PEFT refuses it at once
        for name in names:
            compiled.fullmatch(name)
    return b""


def _patterns(config: Any) -> Iterator[str]:
    """Yield what PEFT takes for regular expressions, as it writes them, less what is a plain name."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        whole = getattr(config, name, None)
        if isinstance(whole, str) and not _PLAIN_NAME.fullmatch(whole):
            yield whole
    tables = [value for key, value in vars(config).items() if key.endswith("_pattern") and isinstance(value, dict)]
    inside = {
        r"(.*\.)?({})": [key for table in tables for key in table],
        r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*": getattr(config, "layers_pattern", None) or (),
        r"(^|.*\.){}($|\..*)": getattr(config, "modules_to_save", None) or (),
    }
    for frame, parts in inside.items():
        names = [parts] if isinstance(parts, str) else map(str, parts)
        yield from (frame.replace("{}", part) for part in names if not _PLAIN_NAME.fullmatch(part))
