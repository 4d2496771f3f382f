"""A stage and its command line: settings in, one registered version out.

    align STAGE CONFIG.yaml key=value --key value --registry DIR [--resume] [--dry-run]

Imports nothing heavy, so `--help` and a wrong setting answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.command_line import help_text, read_command_line
from align.config import StageConfig, build, dump_yaml, write
from align.errors import guard
from align.schema import Kind, View

if TYPE_CHECKING:
    from align.data import RecordSet
    from align.data.tokenised import Columns, TokenPlan
    from align.models.adapters import LoadedBase
    from align.models.memory import LossHead
    from align.registry import Checkpoint, Registry
    from align.training.plan import Outline
    from align.training.run import Run


@dataclass(frozen=True)
class Trained:
    """What a stage hands back: the weights to keep and the numbers worth keeping.

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
    """pictures beside the training curves, each drawn on a matplotlib Axes"""

    @classmethod
    def of(cls, loaded: LoadedBase, config: StageConfig, **rest: Any) -> Trained:
        """The adapter `default` of a loaded base, or its every weight when the settings ask for no adapter."""
        adapter = None if config.lora is None else "default"
        return cls(loaded.model, loaded.tokenizer, loaded.base if adapter else None, adapter, **rest)


@dataclass(frozen=True)
class Stage:
    """One training stage: its name, settings, function, the view of data it needs and the kind it produces."""

    name: str
    config: type[StageConfig]
    run: Callable[[Any, Run], Trained]
    view: View
    produces: Kind
    columns: Columns = "rendered"
    """the columns in which the trainer takes its rows"""
    head: LossHead = "fused"
    """what the trainer puts on the hidden states, for the memory in the plan"""
    trl_config: str | None = None
    """name of the TRL config that `trainer:` passes through to"""
    next_command: str = ""
    """the command to try next; {name} is the name registered, {parent} what it was made from, {settings} what recurs"""

    outline: Callable[[Any, RecordSet], Outline] | None = None
    """what a run that starts from no checkpoint starts from, for its plan"""

    def token_plan(self, config: StageConfig) -> TokenPlan:
        """How a run with these settings turns records into rows."""
        from align.data.tokenised import TokenPlan

        return TokenPlan(self.view, config.token_length, config.on_long, self.columns, config.on_refused)

    def kind(self, config: StageConfig) -> Kind:
        """The kind a run with these settings makes: a base when every weight is trained, else what has an adapter."""
        if config.lora is None:
            return "base"
        return "policy" if self.produces == "base" else self.produces

    @property
    def purpose(self) -> str:
        """The first line of the stage module's docstring."""
        module = sys.modules[self.run.__module__]
        return (module.__doc__ or "").strip().split("\n")[0]


def keep(numbers: dict[str, float], *names: str) -> dict[str, float]:
    """The named numbers that are there, in that order."""
    return {name: numbers[name] for name in names if name in numbers}


def main(stage: Stage, argv: list[str] | None = None) -> int:
    """Run a stage's command line and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return guard(lambda: _command(stage, words), debug="--debug" in words)


def _command(stage: Stage, argv: list[str]) -> None:
    line = read_command_line(argv)
    if line.help:
        write(help_text(f"align {stage.name}", stage.purpose, stage.config, every_part=line.help == "all"))
        return
    config = build(stage.config, line.values)
    if line.print_config:
        write(dump_yaml(config))
        return
    from align.registry import open_registry

    registry = open_registry(line.registry)
    if line.dry_run:
        from align.training.plan import print_plan

        print_plan(stage, config, registry)
        return
    run_stage(stage, config, registry, resume=line.resume, allow_change=line.allow_change)


def run_stage(
    stage: Stage,
    config: StageConfig,
    registry: Registry,
    *,
    resume: bool = False,
    allow_change: tuple[str, ...] = (),
) -> Checkpoint:
    """Run a stage to its end and register the result; with `resume`, go on with the newest run of this name.

    `allow_change` names the settings in which the resumed run may differ from the one that was saved.

    Raises the AlignError that stopped it; nothing is registered unless training ended well.
    """
    from align.models.quiet_libraries import quiet_libraries
    from align.models.start_checks import check_models
    from align.training.folder import open_run, prepare_libraries
    from align.training.preflight import preflight
    from align.training.register import register

    quiet_libraries()
    started_from = preflight(stage, config, registry)
    registry.check_writable(config.name)
    with open_run(stage, config, registry, resume=resume, allow_change=allow_change) as run:
        if run.finished is not None:
            run.say(f"{run.folder.name} is already complete: {run.finished}")
            return registry.resolve(run.finished)
        for setting, checkpoint in started_from.items():
            run.say(f"{setting}: {checkpoint.reference}")
        run.read_ahead()
        check_models(config, registry, started_from)
        prepare_libraries(config.seed)
        trained = stage.run(config, run)
        return register(stage, config, run, trained)
