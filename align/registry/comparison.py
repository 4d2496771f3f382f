"""Two checkpoints side by side by their manifests: settings, data, parents, base, versions, metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from align.registry.checkpoint import Checkpoint

SECTIONS = ("checkpoint", "settings", "data", "parents", "base", "versions", "metrics")


@dataclass(frozen=True)
class FactPair:
    """One fact of two checkpoints; None for the one that does not record it."""

    section: str
    key: str
    first: Any
    second: Any

    @property
    def differs(self) -> bool:
        """Return whether the two are not equal."""
        return bool(self.first != self.second)


def compare_checkpoints(first: Checkpoint, second: Checkpoint) -> list[FactPair]:
    """Return every recorded fact of either checkpoint, section by section, equal or not."""
    left, right = _collect_facts(first), _collect_facts(second)
    return [
        FactPair(section, key, left[section].get(key), right[section].get(key))
        for section in SECTIONS
        for key in dict.fromkeys([*left[section], *right[section]])
    ]


def _collect_facts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    manifest, base = checkpoint.manifest or {}, checkpoint.base
    facts = {"kind": checkpoint.kind} | {key: manifest.get(key) for key in ("stage", "created")}
    sections = {
        "checkpoint": {**facts, "template": manifest.get("template_digest")},
        "settings": dict(flatten_settings(manifest.get("config") or {})),
        "data": dict(_data_facts(manifest.get("data") or [])),
        "parents": {
            f"parent {number}": f"{link['reference']} {link.get('digest') or ''}".strip()
            for number, link in enumerate(checkpoint.parents, start=1)
        },
        "base": {"reference": base.get("reference"), **(base.get("digests") or {})},
        "versions": {**(manifest.get("versions") or {}), "git": manifest.get("git")},
        "metrics": manifest.get("metrics") or {},
    }
    keep_none = ("settings", "data")
    return {
        section: {key: value for key, value in values.items() if value is not None or section in keep_none}
        for section, values in sections.items()
    }


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings with nested keys written as on the command line: lora.r."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data_facts(entries: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for entry in entries:
        name = str(entry.get("name"))
        yield f"{name} rows", entry.get("rows")
        yield f"{name} digest", entry.get("digest")
        for reason, count in (entry.get("dropped") or {}).items():
            yield f"{name} dropped, {reason}", count
