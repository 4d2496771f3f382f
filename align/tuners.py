"""PEFT's tuners (LoRA, OFT, IA3, ...) and what each can do here: the one table that everything else asks.

A tuner that is not listed is refused. To add one, add a line and its row in tests/models/test_tuners.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from align.errors import UsageError, nearest

LORA = "LORA"

Ability = Literal["train", "mix", "stack", "share", "merge", "continue", "copy", "score", "count", "nf4", "int8"]

_TASKS: Mapping[Ability, str] = {
    "train": "train an adapter",
    "mix": "run rows of several adapters in one batch",
    "stack": "be trained on top of a frozen adapter",
    "share": "train beside other adapters on one base, as PPO and GRPO do",
    "merge": "be merged into the weights",
    "continue": "go on training from a saved adapter",
    "copy": "be a frozen copy, the reference of DPO and KTO",
    "score": "carry a score head",
    "count": "be counted before weights are loaded",
    "nf4": "be set on a base in nf4",
    "int8": "be set on a base in int8",
}

_Abilities = Mapping[Ability, str]
_OTHER: _Abilities = {
    "mix": "PEFT mixes adapters in a batch for LoRA only",
    "stack": "only LoRA updates add up to one LoRA adapter",
    "share": "copies and mixed batches are proved for LoRA only",
}
_NEEDS_VALUES: _Abilities = {**_OTHER, "count": "PEFT reads the base's weights to build it"}
_NOT_NF4: _Abilities = {**_OTHER, "nf4": "PEFT computes with the base's weights as if they were not quantized"}
_NOT_QUANTIZED: _Abilities = {**_NOT_NF4, "int8": _NOT_NF4["nf4"]}
_NOT_MOVED = "its tensors stay as they are when it is trained there"
_PROMPT: _Abilities = {
    "train": "it puts trained vectors in front of each row, which the generation engine and packed rows do not have"
}

TUNERS: Mapping[str, _Abilities] = {
    LORA: {},
    **dict.fromkeys(("BEFT", "C3A", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LN_TUNING", "MISS", "OFT"), _OTHER),
    **dict.fromkeys(("PVERA", "RANDLORA", "VBLORA", "VERA", "WAVEFT"), _OTHER),
    **dict.fromkeys(("BOFT", "SHIRA"), _NEEDS_VALUES),
    **dict.fromkeys(("DEFT", "HRA", "LOHA", "LOKR", "PEANUT"), _NOT_NF4),
    **dict.fromkeys(("DELORA", "OSF", "PSOFT", "SUPERTUNING", "TINYLORA"), _NOT_QUANTIZED),
    "ADAMSS": {**_NEEDS_VALUES, **_NOT_QUANTIZED},
    "FROD": {**_NEEDS_VALUES, **_NOT_QUANTIZED},
    "ADALORA": {
        **_OTHER,
        "copy": "PEFT holds one trainable AdaLoRA adapter a model",
        "continue": "its ranks were given out for the steps it was trained for",
    },
    "GLORA": {ability: reason for ability, reason in _NOT_QUANTIZED.items() if ability != "mix"},
    "LILY": {**_OTHER, "merge": "its layers share parts that PEFT does not merge"},
    "ROAD": {ability: reason for ability, reason in _OTHER.items() if ability != "mix"},
    "TRAINABLE_TOKENS": {
        **_OTHER,
        "copy": "PEFT holds one set of trained tokens a model",
        "score": "PEFT saves no head beside trained tokens",
    },
    "UNILORA": {**_NEEDS_VALUES, "nf4": _NOT_MOVED, "int8": _NOT_MOVED},
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING"), _PROMPT),
    **dict.fromkeys(("PREFIX_TUNING", "PROMPT_TUNING"), _PROMPT),
    "POLY": {"train": "it needs the number of a task with every row"},
    "SHADOW": {"train": "it runs a second network, whose state the generation engine does not keep"},
    "XLORA": {"train": "it routes between adapters that are trained already"},
}
"""by PEFT's name of the tuner: what it cannot do, and why"""

OWN_TARGETS = {"BEFT", "IA3", "LN_TUNING", "TRAINABLE_TOKENS"}
"""tuners for which PEFT chooses the modules when none are named; the others adapt every linear layer"""


def tuner_type(config: Mapping[str, Any]) -> str:
    """Return the upper-case name of the tuner in an adapter's config or in the setting `peft`."""
    return str(config.get("peft_type")).rpartition(".")[2].upper()


def find_obstacle(tuner: str, ability: Ability) -> str | None:
    """Return why a tuner cannot do something here, or None when it can."""
    if tuner not in TUNERS:
        return "it is none of PEFT's tuners that are supported"
    return TUNERS[tuner].get("train") or TUNERS[tuner].get(ability)


def require(tuner: str, ability: Ability, subject: str, remedy: str = "use LoRA") -> None:
    """Raise UsageError, with the reason, when a tuner cannot do what is asked of it."""
    if tuner not in TUNERS:
        raise UsageError(f"{subject}: {tuner} is none of PEFT's tuners;{nearest(tuner, trainable_tuners())}")
    if reason := find_obstacle(tuner, ability):
        raise UsageError(f"{subject}: {tuner} cannot {_TASKS[ability]}: {reason}; {remedy}")


def trainable_tuners() -> list[str]:
    """Return the names of the tuners that can be trained, LoRA first."""
    return sorted((name for name in TUNERS if "train" not in TUNERS[name]), key=lambda name: (name != LORA, name))
