"""The ancestors and descendants of a checkpoint, and the base of an adapter, as far as this machine has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError
from align.registry import evaluations
from align.registry.checkpoint import Checkpoint, adapter_config
from align.registry.references import is_local_name

if TYPE_CHECKING:
    from align.registry.store import Registry

Resolve = Callable[[str], Checkpoint]


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint in a lineage; `note` is the problem of the link that led to it, if any."""

    reference: str
    kind: str
    stage: str
    digest: str | None
    note: str = ""
    evaluation: str = ""
    """the main number of its newest evaluation"""
    parents: tuple[Ancestor, ...] = ()


def trace_lineage(checkpoint: Checkpoint, resolve: Resolve, below: frozenset[str] = frozenset()) -> Ancestor:
    """Return the tree of ancestors; it ends at a root, a missing parent, or a digest that does not match."""
    # A parent recorded without its digest may by now descend from its own child.
    below = below | {checkpoint.reference}
    parents = []
    for link in parent_links(checkpoint):
        ancestor, parent = follow_link(link, resolve)
        if parent is not None and parent.reference not in below:
            ancestor = trace_lineage(parent, resolve, below)
        parents.append(ancestor)
    return replace(_describe(checkpoint), parents=tuple(parents))


def parent_links(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the recorded parents ({reference, digest}); the base for an adapter that has none."""
    base = checkpoint.base.get("reference")
    if not checkpoint.parents and base and checkpoint.kind != "base":
        return [{"reference": base}]
    return checkpoint.parents


def follow_link(link: dict[str, Any], resolve: Resolve) -> tuple[Ancestor, Checkpoint | None]:
    """Return what a recorded parent is today, without its own parents, and its checkpoint when it has not changed."""
    reference, recorded = link["reference"], link.get("digest")
    try:
        parent = resolve(reference)
    except (IntegrityError, UsageError):
        return Ancestor(reference, "", "", recorded, note="is not here or is damaged"), None
    if recorded is not None and parent.digest is not None and recorded != parent.digest:
        return _describe(parent, note="has changed since"), None
    return _describe(parent), parent


def find_children(parent: Checkpoint | str, versions: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the versions made directly from a checkpoint: with it as a parent, or as the base of an adapter.

    A version that cannot be read any more is given by its reference.
    """
    reference, digest = (parent, None) if isinstance(parent, str) else (parent.reference, parent.digest)
    children = []
    for version in versions:
        # The base is recorded by the digests of its content, not of its manifest.
        links = [*version.parents, {"reference": version.base.get("reference")}]
        digests = [link.get("digest") for link in links if link.get("reference") == reference]
        if any(recorded is None or digest is None or recorded == digest for recorded in digests):
            children.append(version)
    return children


def find_descendants(ancestor: Checkpoint | str, versions: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the versions made from a checkpoint, from those, and so on, in order of name and version."""
    everything, waiting, descendants = list(versions), [ancestor], dict[str, Checkpoint]()
    while waiting:
        for child in find_children(waiting.pop(), everything):
            if child.reference not in descendants:
                descendants[child.reference] = child
                waiting.append(child)
    return sorted(descendants.values(), key=lambda version: (version.name or "", version.version or 0))


def _describe(checkpoint: Checkpoint, note: str = "") -> Ancestor:
    stage = (checkpoint.manifest or {}).get("stage", "")
    evaluation = evaluations.describe_headline(evaluations.newest_record(checkpoint) or {})
    return Ancestor(checkpoint.reference, checkpoint.kind, stage, checkpoint.digest, note, evaluation=evaluation)


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
