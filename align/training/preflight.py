"""What can be known to be wrong before data is rendered and weights are loaded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from align.errors import MachineError, UsageError
from align.models.adapters import check_digests
from align.models.counting import context_length
from align.training.arguments import check_passthrough

if TYPE_CHECKING:
    from align.config import StageConfig
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage


def preflight(stage: Stage, config: StageConfig, registry: Registry) -> dict[str, Checkpoint]:
    """Check settings against each other, the registry and the start; returns the checkpoints the settings name."""
    check_passthrough(stage, config)
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise MachineError(f"report_to={tracker}: the package {tracker} is not installed; pip install {tracker}")
    found = {key: registry.resolve(reference) for key, reference in config.references.items()}
    for checkpoint in found.values():
        _check_start(config, registry, checkpoint)
    _check_name(stage, config, registry)
    return found


def _check_start(config: StageConfig, registry: Registry, checkpoint: Checkpoint) -> None:
    base = registry.resolve_base(checkpoint) if checkpoint.is_adapter else checkpoint
    check_digests(checkpoint, base, registry)
    positions = context_length(base)
    if positions is not None and config.max_length > positions:
        raise UsageError(
            f"max_length={config.max_length}: {base.reference} holds {positions} positions; "
            f"give max_length={positions} or less"
        )


def _check_name(stage: Stage, config: StageConfig, registry: Registry) -> None:
    """One name holds versions of one kind, or `model=NAME` would change its meaning by itself."""
    if config.name not in registry.names():
        return
    newest = registry.resolve(config.name)
    if newest.kind != stage.produces:
        raise UsageError(
            f"name={config.name}: {newest.reference} is a {newest.kind} and this makes a {stage.produces}; "
            "choose another name"
        )
