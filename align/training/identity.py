"""The identity of a run: what a resumed run must share with the one that was saved, and how two are compared."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from align.config import StageConfig
from align.errors import IntegrityError, UsageError, nearest
from align.models.adapters import digests_of_base
from align.registry.redaction import redact

if TYPE_CHECKING:
    from align.registry import Registry
    from align.training.stage import Stage

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
_FREE = {"logging_steps", "save_steps", "report_to", "dataset_num_proc", "gold"}
"""settings that change what is reported and not what is trained"""
_FIXED = ("stage", "name", "model", "lora.r", "lora.target_modules", "lora.use_dora", "peft", "adapter")
"""settings that decide the shape of the saved tensors, so that no continuation can change them"""


def describe_run(stage: Stage, config: StageConfig, registry: Registry, world_size: int) -> dict[str, Any]:
    """Return what identifies a run before it has read its data: stage, settings, versions and resolved references.

    Access tokens among the settings are left out: this is written to disk, and another token is no other run.
    """
    starts = {key: _describe_reference(reference, registry) for key, reference in config.references.items()}
    sizes = {"world_size": world_size, "versions": package_versions()}
    return {"stage": stage.name} | identifying_settings(config) | starts | sizes


def _describe_reference(reference: str, registry: Registry) -> dict[str, Any]:
    checkpoint = registry.resolve(reference)
    base = registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
    return {
        "reference": checkpoint.reference,
        "digest": checkpoint.digest,
        "base": digests_of_base(base, registry) if not base.is_hub else base.reference,
    }


def identifying_settings(config: StageConfig) -> dict[str, Any]:
    """Return the settings that identify a run, as JSON values without access tokens."""
    return redact({key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE})


def package_versions() -> dict[str, str]:
    """Return the versions of the packages a result depends on."""
    return {package: version(package) for package in _PACKAGES}


def refuse_changes(what: str, before: dict[str, Any], now: dict[str, Any], allowed: Iterable[str]) -> list[str]:
    """Return the allowed differences of two identities, one line each; raise IntegrityError for any other."""
    old, new = _flatten(before), _flatten(now)
    keys = [key for key in sorted(old.keys() | new.keys()) if not is_same(old.get(key), new.get(key))]
    changed = {key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys}
    refused = [key for key in changed if not _covers(allowed, key)]
    if not refused:
        return list(changed.values())
    settings = ",".join(sorted({key.partition("[")[0] for key in refused}))
    fixed = any(_covers(_FIXED, key) for key in refused)
    raise IntegrityError(
        f"{what} ({'; '.join(changed[key] for key in refused)}); restore those settings"
        f"{'' if fixed else f', allow it with --allow-change {settings}'}, or start a new run without --resume"
    )


def is_same(before: Any, now: Any) -> bool:
    """Return whether a setting is unchanged; an empty mapping is the same as no setting."""
    return (before if before != {} else None) == (now if now != {} else None)


def check_allowed(allowed: Iterable[str], identity: dict[str, Any]) -> None:
    """Raise UsageError for a field that no identity has or that decides the shape of the saved tensors."""
    parts = (key.split(".") for key in _flatten(identity))
    names = {"data", *(".".join(part[:length]) for part in parts for length in range(1, len(part) + 1))}
    for field in allowed:
        if field not in names:
            raise UsageError(f"--allow-change {field}: no such setting;{nearest(field, sorted(names))}")
        if any(_covers([field], fixed) or _covers([fixed], field) for fixed in _FIXED):
            raise UsageError(
                f"--allow-change {field}: what was saved depends on it and cannot be loaded otherwise; "
                "start a new run without --resume"
            )


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _covers(fields: Iterable[str], key: str) -> bool:
    """Return whether a key is one of some fields or a part of one."""
    return any(key == field or key.startswith((field + ".", field + "[")) for field in fields)
