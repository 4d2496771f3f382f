"""What a checkpoint was made from, to the roots, as far as this machine knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from align.errors import IntegrityError, UsageError
from align.registry.checkpoint import Checkpoint

Resolve = Callable[[str], Checkpoint]


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint in a lineage; `note` says what is wrong with the link that led to it, if anything."""

    reference: str
    kind: str
    stage: str
    digest: str | None
    note: str = ""
    parents: tuple[Ancestor, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The tree as JSON values."""
        flat = {key: getattr(self, key) for key in ("reference", "kind", "stage", "digest", "note")}
        return {**flat, "parents": [parent.as_dict() for parent in self.parents]}


def trace(checkpoint: Checkpoint, resolve: Resolve) -> Ancestor:
    """The tree above a checkpoint. Ends at a root, at a missing parent, or where a recorded digest does not match."""
    return _grow(_describe(checkpoint), checkpoint, resolve, frozenset())


def links(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The recorded parents ({reference, digest}); an adapter that has none descends from its base."""
    manifest = checkpoint.manifest or {}
    parents = list(manifest.get("parents") or [])
    base = manifest.get("base") or {}
    if not parents and base.get("reference") and checkpoint.kind != "base":
        parents = [{"reference": base["reference"]}]
    return parents


def follow(link: dict[str, Any], resolve: Resolve) -> Ancestor:
    """What a recorded parent is today, without its own parents."""
    return _follow(link, resolve)[0]


def _follow(link: dict[str, Any], resolve: Resolve) -> tuple[Ancestor, Checkpoint | None]:
    reference, recorded = link["reference"], link.get("digest")
    try:
        parent = resolve(reference)
    except (IntegrityError, UsageError):
        return Ancestor(reference, "", "", recorded, note="is not here or is damaged"), None
    if recorded is not None and parent.digest is not None and recorded != parent.digest:
        return _describe(parent, note="has changed since"), None
    return _describe(parent), parent


def _grow(node: Ancestor, checkpoint: Checkpoint, resolve: Resolve, below: frozenset[str]) -> Ancestor:
    # A parent recorded without its digest may by now descend from its own child.
    below = below | {checkpoint.reference}
    grown = []
    for link in links(checkpoint):
        parent, found = _follow(link, resolve)
        if found is not None and found.reference not in below:
            parent = _grow(parent, found, resolve, below)
        grown.append(parent)
    return replace(node, parents=tuple(grown))


def _describe(checkpoint: Checkpoint, note: str = "") -> Ancestor:
    stage = (checkpoint.manifest or {}).get("stage", "")
    return Ancestor(checkpoint.reference, checkpoint.kind, stage, checkpoint.digest, note)
