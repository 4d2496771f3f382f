"""Two checkpoints side by side, as far as their manifests tell: settings, data, parents, base, versions, metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from align.registry.checkpoint import Checkpoint

SECTIONS = ("checkpoint", "settings", "data", "parents", "base", "versions", "metrics")


@dataclass(frozen=True)
class Pair:
    """What two checkpoints say about one thing; None where one says nothing."""

    section: str
    key: str
    first: Any
    second: Any

    @property
    def differs(self) -> bool:
        """Whether they say different things."""
        return bool(self.first != self.second)


def compare(first: Checkpoint, second: Checkpoint) -> list[Pair]:
    """Everything either checkpoint records, paired, section by section, equal or not."""
    ours, theirs = _facts(first), _facts(second)
    keys = {section: dict.fromkeys([*ours[section], *theirs[section]]) for section in SECTIONS}
    return [
        Pair(section, key, ours[section].get(key), theirs[section].get(key))
        for section in SECTIONS
        for key in keys[section]
    ]


def _facts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    manifest = checkpoint.manifest or {}
    base = manifest.get("base") or {}
    about = {"kind": checkpoint.kind, "stage": manifest.get("stage"), "created": manifest.get("created")}
    links = {f"parent {number}": link for number, link in enumerate(manifest.get("parents") or [], start=1)}
    program = {**(manifest.get("versions") or {}), "git": manifest.get("git")}
    return {
        "checkpoint": _said({**about, "template": manifest.get("template_digest")}),
        "settings": dict(_flat(manifest.get("config") or {})),
        "data": dict(_data(manifest.get("data") or [])),
        "parents": {key: f"{link['reference']} {link.get('digest') or ''}".strip() for key, link in links.items()},
        "base": _said({"reference": base.get("reference"), **(base.get("digests") or {})}),
        "versions": _said(program),
        "metrics": _said(manifest.get("metrics") or {}),
    }


def _said(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with nested keys written as on the command line: lora.r."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data(entries: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for entry in entries:
        name = str(entry.get("name"))
        yield f"{name} rows", entry.get("rows")
        yield f"{name} digest", entry.get("digest")
        for reason, count in (entry.get("dropped") or {}).items():
            yield f"{name} dropped, {reason}", count
