"""Taking a version out on request: only when nothing stands on it, and into the trash, from where it can come back."""

from __future__ import annotations

from pathlib import Path

from align.errors import IntegrityError, UsageError
from align.registry import aside, lineage
from align.registry.aside import Aside
from align.registry.checkpoint import Checkpoint
from align.registry.store import Registry

_NAMED = 5


def remove(registry: Registry, reference: str) -> Aside:
    """Move a version to trash/.

    Raises UsageError unless the reference names one version of this registry, IntegrityError when an alias or another
    version stands on it.
    """
    checkpoint = registry.resolve(reference)
    if Path(checkpoint.location).parent.parent != registry.models:
        raise UsageError(f"rm {reference}: it is not in this registry; only registered versions can be removed")
    if "@" not in reference and "/" not in reference:
        raise UsageError(f"rm {reference}: this names a version only by being the newest; write {checkpoint.reference}")
    registry.check_writable(checkpoint.name)
    if reasons := _in_use(registry, checkpoint):
        raise IntegrityError(f"rm {checkpoint.reference}: it is in use; {'; '.join(reasons)}")
    return aside.set_version_aside(registry.root, "trash", Path(checkpoint.location), "rm", registry.disk)


def _in_use(registry: Registry, checkpoint: Checkpoint) -> list[str]:
    name = checkpoint.name or ""
    aliases = [f"{name}@{word}" for word, number in registry.aliases(name).items() if number == checkpoint.version]
    below = [child.reference for child in lineage.descendants(checkpoint, registry.all_versions())]
    reasons = []
    if aliases:
        reasons.append(
            f"{_several(aliases)} would mean nothing, move it or take it away with alias NAME ALIAS --remove"
        )
    if below:
        reasons.append(f"{_several(below)} {'was' if len(below) == 1 else 'were'} made from it, remove that first")
    return reasons


def _several(words: list[str]) -> str:
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(words[:_NAMED]) + more
