"""The ancestors and descendants of a checkpoint, as far as this machine has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from align.errors import IntegrityError, UsageError
from align.registry import evaluations
from align.registry.checkpoint import Checkpoint

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


def trace_lineage(checkpoint: Checkpoint, resolve: Resolve) -> Ancestor:
    """Return the tree of ancestors; it ends at a root, a missing parent, or a digest that does not match."""
    return _add_parents(_describe(checkpoint), checkpoint, resolve, frozenset())


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
    return [version for version in versions if any(_is_link_to(link, reference, digest) for link in _origins(version))]


def find_descendants(ancestor: Checkpoint | str, versions: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the versions made from a checkpoint, from those, and so on, in order of name and version."""
    everything, waiting, descendants = list(versions), [ancestor], dict[str, Checkpoint]()
    while waiting:
        for child in find_children(waiting.pop(), everything):
            if child.reference not in descendants:
                descendants[child.reference] = child
                waiting.append(child)
    return sorted(descendants.values(), key=lambda version: (version.name or "", version.version or 0))


def _origins(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return links to parents and base; the base is recorded by the digests of its content, not of its manifest."""
    base = checkpoint.base.get("reference")
    return [*checkpoint.parents, *([{"reference": base}] if base else [])]


def _is_link_to(link: dict[str, Any], reference: str, digest: str | None) -> bool:
    recorded = link.get("digest")
    return link.get("reference") == reference and (recorded is None or digest is None or recorded == digest)


def _add_parents(node: Ancestor, checkpoint: Checkpoint, resolve: Resolve, below: frozenset[str]) -> Ancestor:
    # A parent recorded without its digest may by now descend from its own child.
    below = below | {checkpoint.reference}
    parents = []
    for link in parent_links(checkpoint):
        parent, found = follow_link(link, resolve)
        if found is not None and found.reference not in below:
            parent = _add_parents(parent, found, resolve, below)
        parents.append(parent)
    return replace(node, parents=tuple(parents))


def _describe(checkpoint: Checkpoint, note: str = "") -> Ancestor:
    stage = (checkpoint.manifest or {}).get("stage", "")
    evaluation = evaluations.describe_headline(evaluations.newest_record(checkpoint) or {})
    return Ancestor(checkpoint.reference, checkpoint.kind, stage, checkpoint.digest, note, evaluation=evaluation)
