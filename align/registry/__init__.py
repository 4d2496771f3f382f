"""Named, numbered, immutable checkpoints that explain themselves: references, lineage, fingerprints, verification."""

from align.registry.checkpoint import Checkpoint
from align.registry.lineage import Ancestor
from align.registry.store import Registry, Staging, default_root, open_registry

__all__ = ["Ancestor", "Checkpoint", "Registry", "Staging", "default_root", "open_registry"]
