"""The base an adapter was trained on: where it may be today, and which of those places holds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from align.errors import IntegrityError, UsageError
from align.registry import layout
from align.registry.checkpoint import Checkpoint, adapter_config
from align.registry.references import is_local_name


class Resolver(Protocol):
    """What of a registry is needed here."""

    root: Path
    base: str | None

    def known_bases(self) -> list[str]:
        """Folders that were named as places of bases."""

    def resolve(self, reference: str) -> Checkpoint:
        """The checkpoint a reference leads to."""

    def base_digests(self, location: str | Path) -> dict[str, str]:
        """What a base in a folder is, by content."""

    def bases_like(self, digests: dict[str, str]) -> Iterator[Checkpoint]:
        """The registered bases that were committed with these digests."""


def home_of(checkpoint: Checkpoint) -> Path | None:
    """The registry whose version a folder is, by where it lies: HOME/models/NAME/v0001."""
    folder = Path(checkpoint.location)
    models = folder.parent.parent
    return models.parent if layout.version_number(folder.name) and models.name == "models" else None


def find_base(checkpoint: Checkpoint, here: Resolver, beside: Resolver | None) -> Checkpoint:
    """The base of an adapter: the first place that has one with the recorded digests, whatever its name by now.

    `beside` is the registry the adapter lies in when that is not `here`; versions there were named by it, so it goes
    first. A base on the hub is taken at its word: only its download has digests.
    """
    recorded = (checkpoint.manifest or {}).get("base") or {}
    if here.base is not None:
        return _named_base(checkpoint, recorded.get("digests") or {}, here, here.base)
    reasons = []
    for place, reference, registry in _places(checkpoint, recorded, here, beside):
        try:
            # By its path, because a name of another registry means something else here.
            base = registry.resolve(reference)
            base = here.resolve(base.location) if registry is beside else base
            reason = "" if base.is_hub else _difference(recorded.get("digests") or {}, base, here)
        except (IntegrityError, UsageError) as error:
            reason = str(error).removeprefix(f"{reference}: ")
        if not reason:
            return base
        reasons.append(f"\n  {place}: {reason}")
    if not reasons:
        raise IntegrityError(
            f"{checkpoint.reference}: says nowhere which base it was trained on; say it with --base DIR"
        )
    raise IntegrityError(
        f"{checkpoint.reference}: its base was not found; restore it in one of these places, or say where it is now: "
        "--base DIR on the command, for good align registry base DIR" + "".join(reasons)
    )


def _named_base(checkpoint: Checkpoint, digests: dict[str, str], here: Resolver, named: str) -> Checkpoint:
    """The base that was named on the command line; IntegrityError unless its content is the recorded one."""
    base = here.resolve(named)
    if base.is_adapter:
        raise IntegrityError(f"--base {named}: an adapter; give the base under {checkpoint.reference}")
    if not base.is_hub and (difference := _difference(digests, base, here)):
        raise IntegrityError(
            f"{checkpoint.reference} over --base {named}: {difference}; give the base it was trained on"
        )
    return base


def _places(
    checkpoint: Checkpoint, recorded: dict[str, Any], here: Resolver, beside: Resolver | None
) -> Iterator[tuple[str, str, Resolver]]:
    """Where to look, in order: (how to call the place, reference, who resolves it)."""
    claimed = adapter_config(Path(checkpoint.location)).get("base_model_name_or_path")
    named = (recorded.get("reference"), recorded.get("location"), claimed)
    for reference in dict.fromkeys(name for name in named if name and isinstance(name, str)):
        if not is_local_name(reference):
            yield reference, reference, here
            continue
        for registry in filter(None, (beside, here)):
            yield f"{reference} in {registry.root}", reference, registry
    for registry in filter(None, (beside, here)):
        for folder in registry.known_bases() if recorded.get("digests") else ():
            yield folder, folder, here
        for base in registry.bases_like(recorded.get("digests") or {}):
            yield f"{base.reference} in {registry.root}", base.reference, registry


def _difference(recorded: dict[str, str], base: Checkpoint, here: Resolver) -> str:
    """How a base differs from the recorded digests; empty when it does not."""
    found = here.base_digests(base.location) if recorded else {}
    part = next((part for part, digest in recorded.items() if found.get(part) != digest), None)
    if part is None:
        return ""
    return f"the adapter was trained over a base whose {part} is {recorded[part]}, but this has {found.get(part)}"
