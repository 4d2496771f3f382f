"""What a checkpoint was made from, to the roots, as far as this machine knows."""

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
    """A checkpoint in a lineage; `note` says what is wrong with the link that led to it, if anything."""

    reference: str
    kind: str
    stage: str
    digest: str | None
    note: str = ""
    parents: tuple[Ancestor, ...] = ()
    evaluation: str = ""
    """the telling number of its newest evaluation"""

    def as_dict(self) -> dict[str, Any]:
        """The tree as JSON values."""
        flat = {key: getattr(self, key) for key in ("reference", "kind", "stage", "digest", "note", "evaluation")}
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


def children(of: Checkpoint | str, versions: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The versions that were made directly from a checkpoint: as a parent, or as the base of an adapter.

    A version that cannot be read any more is given by its reference.
    """
    reference, digest = (of, None) if isinstance(of, str) else (of.reference, of.digest)
    return [version for version in versions if any(_is_link_to(link, reference, digest) for link in _origins(version))]


def descendants(of: Checkpoint | str, versions: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The versions that were made from a checkpoint, from those, and so on."""
    known, waiting, found = list(versions), [of], dict[str, Checkpoint]()
    while waiting:
        for child in children(waiting.pop(), known):
            if child.reference not in found:
                found[child.reference] = child
                waiting.append(child)
    return sorted(found.values(), key=lambda version: (version.name or "", version.version or 0))


def _origins(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Parents and base of a version; the base is recorded by the digests of its content, not of its manifest."""
    manifest = checkpoint.manifest or {}
    base = (manifest.get("base") or {}).get("reference")
    return [*(manifest.get("parents") or []), *([{"reference": base}] if base else [])]


def _is_link_to(link: dict[str, Any], reference: str, digest: str | None) -> bool:
    recorded = link.get("digest")
    return link.get("reference") == reference and (recorded is None or digest is None or recorded == digest)


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
    told = evaluations.headline(evaluations.newest(checkpoint) or {})
    return Ancestor(checkpoint.reference, checkpoint.kind, stage, checkpoint.digest, note, evaluation=told)
