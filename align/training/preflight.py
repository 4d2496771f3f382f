"""Checks of a run before its data is rendered and its weights are loaded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from align.data.load import require_files
from align.errors import MachineError, UsageError
from align.models.adapters import refuse_reward
from align.models.heads import check_score_head
from align.models.start_checks import check_files
from align.training.trl_bridge import check_passthrough

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
    """Check settings against each other and the registry, and return the checkpoints that they name."""
    check_passthrough(stage, config)
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise MachineError(f"report_to={tracker}: the package {tracker} is not installed; {_INSTALL[tracker]}")
    require_files([*config.data_specs, *config.eval_specs])
    checkpoints = {key: registry.resolve(reference) for key, reference in config.references.items()}
    _check_start(stage, checkpoints.get("model"))
    check_files(config, registry, checkpoints)
    _check_name(stage, config, registry)
    return checkpoints


def _check_start(stage: Stage, start: Checkpoint | None) -> None:
    """Refuse a reward model as the start of anything but a reward model, or without its score head."""
    if start is None or start.kind != "reward":
        return
    if stage.produces != "reward":
        refuse_reward(start)
    check_score_head(start)


def _check_name(stage: Stage, config: StageConfig, registry: Registry) -> None:
    """Refuse a name that holds versions of another kind: `model=NAME` would change its meaning."""
    if config.name not in registry.names():
        return
    newest = registry.resolve(config.name)
    if newest.kind != stage.kind(config):
        raise UsageError(
            f"name={config.name}: {newest.reference} is a {newest.kind} and this makes a {stage.kind(config)}; "
            "choose another name"
        )
