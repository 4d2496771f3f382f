"""Finding the base an adapter was trained on, by the digests of its content, wherever it is by now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import IntegrityError, UsageError
from align.registry import disk_layout
from align.registry.checkpoint import Checkpoint, adapter_config
from align.registry.references import is_local_name

if TYPE_CHECKING:
    from align.registry.store import Registry


def registry_root_of(checkpoint: Checkpoint) -> Path | None:
    """Return the root of the registry that a checkpoint's folder lies in: ROOT/models/NAME/v0001."""
    folder = Path(checkpoint.location)
    models = folder.parent.parent
    return models.parent if disk_layout.version_number(folder.name) and models.name == "models" else None


def find_base(checkpoint: Checkpoint, registry: Registry, origin: Registry | None) -> Checkpoint:
    """Return the base of an adapter: the first candidate with the recorded digests.

    `origin` is the registry the adapter lies in when that is not `registry`; its names are tried first. A base on the
    hub is not compared: only its download has digests.
    """
    digests = checkpoint.base.get("digests") or {}
    if registry.base is not None:
        return _resolve_given_base(checkpoint, digests, registry, registry.base)
    reasons = []
    for location, reference, source in _candidates(checkpoint, digests, registry, origin):
        try:
            base = source.resolve(reference)
            # By its path, because a name of another registry means something else here.
            base = registry.resolve(base.location) if source is origin else base
            reason = "" if base.is_hub else _describe_difference(digests, base, registry)
        except (IntegrityError, UsageError) as error:
            reason = str(error).removeprefix(f"{reference}: ")
        if not reason:
            return base
        reasons.append(f"\n  {location}: {reason}")
    if not reasons:
        raise IntegrityError(f"{checkpoint.reference}: does not record its base; give it with --base DIR")
    raise IntegrityError(
        f"{checkpoint.reference}: its base was not found; restore it in one of these places, or give its folder: "
        "--base DIR for this command, align registry base DIR for all" + "".join(reasons)
    )


def _resolve_given_base(checkpoint: Checkpoint, digests: dict[str, str], registry: Registry, given: str) -> Checkpoint:
    """Return the base given on the command line; IntegrityError unless its content is the recorded one."""
    base = registry.resolve(given)
    if base.is_adapter:
        raise IntegrityError(f"--base {given}: an adapter; give the base under {checkpoint.reference}")
    if not base.is_hub and (difference := _describe_difference(digests, base, registry)):
        raise IntegrityError(
            f"{checkpoint.reference} over --base {given}: {difference}; give the base it was trained on"
        )
    return base


def _candidates(
    checkpoint: Checkpoint, digests: dict[str, str], registry: Registry, origin: Registry | None
) -> Iterator[tuple[str, str, Registry]]:
    """Yield (location for messages, reference, registry that resolves it) in the order of search."""
    registries = [source for source in (origin, registry) if source]
    claimed = adapter_config(Path(checkpoint.location)).get("base_model_name_or_path")
    names = (checkpoint.base.get("reference"), checkpoint.base.get("location"), claimed)
    for reference in dict.fromkeys(name for name in names if name and isinstance(name, str)):
        if is_local_name(reference):
            yield from ((f"{reference} in {source.root}", reference, source) for source in registries)
        else:
            yield reference, reference, registry
    for source in registries:
        for folder in source.known_bases() if digests else ():
            yield folder, folder, registry
        for base in source.bases_like(digests):
            yield f"{base.reference} in {source.root}", base.reference, source


def _describe_difference(digests: dict[str, str], base: Checkpoint, registry: Registry) -> str:
    """Return how a base differs from the recorded digests; empty when it does not."""
    actual = registry.base_digests(base.location) if digests else {}
    for part, digest in digests.items():
        if actual.get(part) != digest:
            return f"the adapter was trained over a base whose {part} is {digest}, but this has {actual.get(part)}"
    return ""
