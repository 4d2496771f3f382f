"""The description of a training stage and what its function returns; `align.training.command` runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.config import StageConfig
from align.models.quiet_libraries import ENGINE
from align.schema import Kind, View

if TYPE_CHECKING:
    from align.data import RecordSet
    from align.data.tokenise import Columns
    from align.models.adapters import LoadedBase
    from align.models.memory import LossHead
    from align.registry import Checkpoint
    from align.training.plan import Outline
    from align.training.run import Run


@dataclass(frozen=True)
class Trained:
    """The weights and metrics that a stage function returns, to be registered.

    `adapter` names the adapter of `model` to save; None saves the full model as a new base. `parents` are the
    checkpoints it was made from, the first being the one it continues.
    """

    model: Any
    tokenizer: Any
    base: Checkpoint | None
    adapter: str | None = "default"
    metrics: dict[str, float] = field(default_factory=dict)
    parents: list[Checkpoint] = field(default_factory=list)
    panels: tuple[Callable[[Any], None], ...] = ()
    """figures beside the training curves, each drawn on a matplotlib Axes"""

    @classmethod
    def of(cls, loaded: LoadedBase, config: StageConfig, **rest: Any) -> Trained:
        """Return the adapter `default` of a loaded base, or all its weights when the settings ask for no adapter."""
        adapter = None if config.new_adapter is None else "default"
        return cls(loaded.model, loaded.tokenizer, loaded.base if adapter else None, adapter, **rest)


@dataclass(frozen=True)
class Stage:
    """A training stage: its name, settings, function, the view of data it needs and the kind it produces."""

    name: str
    config: type[StageConfig]
    run: Callable[[Any, Run], Trained]
    view: View
    produces: Kind
    columns: Columns = "rendered"
    """the columns in which the trainer reads its rows"""
    head: LossHead = "fused"
    """how the trainer computes the loss from hidden states, for the memory in the plan"""
    trl_config: str | None = None
    """name of the TRL config that `trainer:` passes through to"""
    next_command: str = ""
    """the command to try next, with {name} registered, {parent} it was made from and {settings} to repeat"""

    outline: Callable[[Any, RecordSet], Outline] | None = None
    """returns what a run from no checkpoint starts from, for its plan"""

    def kind(self, config: StageConfig) -> Kind:
        """Return the kind that a run with these settings registers."""
        if config.new_adapter is None:
            return "base"
        return "policy" if self.produces == "base" else self.produces

    @property
    def libraries(self) -> list[str]:
        """The libraries that a run imports and that take seconds."""
        named = self.trl_config or "TrainingArguments"
        trl = [f"trl.trainer.{named.removesuffix('Config').lower()}_trainer"] if named.endswith("Config") else []
        return [*ENGINE, "datasets", *trl]

    @property
    def purpose(self) -> str:
        """The first line of the stage module's docstring."""
        module = sys.modules[self.run.__module__]
        return (module.__doc__ or "").strip().split("\n")[0]


def select_metrics(numbers: dict[str, float], *names: str) -> dict[str, float]:
    """Return the named numbers that are there, in that order."""
    return {name: numbers[name] for name in names if name in numbers}
