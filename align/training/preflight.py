"""What can be known to be wrong before data is rendered and weights are loaded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from align.data.load import require_files
from align.errors import MachineError, UsageError
from align.models.adapters import refuse_reward
from align.models.heads import check_score_head
from align.models.start_checks import check_files
from align.training.arguments import check_passthrough

if TYPE_CHECKING:
    from align.config import StageConfig
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage


_BOTH = "pip install {0}, or 'align[{1}]'"
_INSTALL = {name: _BOTH.format(name, "trackers") for name in ("wandb", "mlflow", "trackio")} | {
    "tensorboard": _BOTH.format("tensorboard", "tensorboard"),
    "comet_ml": "pip install comet_ml",
}


def preflight(stage: Stage, config: StageConfig, registry: Registry) -> dict[str, Checkpoint]:
    """Check settings against each other, the registry and the start; returns the checkpoints the settings name."""
    check_passthrough(stage, config)
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise MachineError(f"report_to={tracker}: the package {tracker} is not installed; {_INSTALL[tracker]}")
    require_files([*config.data_specs, *_listed(config.eval_data)])
    found = {key: registry.resolve(reference) for key, reference in config.references.items()}
    _check_start(stage, found)
    check_files(config, registry, found)
    _check_name(stage, config, registry)
    return found


def _listed(specs: str | list[str] | None) -> list[str]:
    return [specs] if isinstance(specs, str) else specs or []


def _check_start(stage: Stage, found: dict[str, Checkpoint]) -> None:
    """A reward model is a start for another one only, and only with its score head."""
    start = found.get("model")
    if start is None or start.kind != "reward":
        return
    if stage.produces != "reward":
        refuse_reward(start)
    check_score_head(start)


def _check_name(stage: Stage, config: StageConfig, registry: Registry) -> None:
    """One name holds versions of one kind, or `model=NAME` would change its meaning by itself."""
    if config.name not in registry.names():
        return
    newest = registry.resolve(config.name)
    if newest.kind != stage.kind(config):
        raise UsageError(
            f"name={config.name}: {newest.reference} is a {newest.kind} and this makes a {stage.kind(config)}; "
            "choose another name"
        )
