"""A stage's command line: settings in, one registered version out.

    align STAGE CONFIG.yaml key=value --key value --registry DIR [--resume] [--dry-run]

Imports nothing heavy, so `--help` and a wrong setting answer at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from align.command_line import help_text, read_command_line
from align.config import StageConfig, build, dump_yaml, write
from align.errors import guard

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage


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
    _announce(stage, config)
    from align.registry import open_registry

    registry = open_registry(line.registry)
    if line.dry_run:
        from align.training.plan import print_plan

        print_plan(stage, config, registry)
        return
    run_stage(stage, config, registry, resume=line.resume, allow_change=line.allow_change)


def _announce(stage: Stage, config: StageConfig) -> None:
    """Write the first line, once for all ranks: stage, start, data and name."""
    if os.environ.get("RANK", "0") == "0":
        write(f"{stage.name}: {config.model} on {', '.join(config.data_specs)}, to be {config.name}")


def run_stage(
    stage: Stage, config: StageConfig, registry: Registry, *, resume: bool = False, allow_change: tuple[str, ...] = ()
) -> Checkpoint:
    """Run a stage to its end and register the result; with `resume`, go on with the newest run of this name.

    `allow_change` names the settings in which the resumed run may differ from the one that was saved. Raises the
    AlignError that stopped it; nothing is registered unless training ended well.
    """
    from align.models.quiet_libraries import import_libraries, quiet_libraries
    from align.models.start_checks import check_models
    from align.training.plan import find_unused_settings, preflight
    from align.training.planned_step import count_steps
    from align.training.register import register
    from align.training.run import open_run

    quiet_libraries()
    started_from = preflight(stage, config, registry)
    registry.check_writable(config.name)
    with open_run(stage, config, registry, resume=resume, allow_change=allow_change) as run:
        if (registered := run.ranks.from_rank_zero(run.start)) is not None:
            run.print_line(f"{run.folder.name} is already complete: {registered}")
            return registry.resolve(registered)
        for setting, checkpoint in started_from.items():
            run.print_line(f"{setting}: {checkpoint.reference}")
        for line in find_unused_settings(config, started_from.get("model")):
            run.print_line(line)
        run.data.read()
        if stage.view != "text" and config.save_unit == 1:
            # What tokenising drops and packing joins makes fewer steps still.
            config.refuse_endless_warmup(count_steps(config, len(run.data.train.records)))
        import_libraries(*stage.libraries)
        check_models(config, registry, started_from)
        from datasets import disable_progress_bars
        from transformers import set_seed
        from transformers.utils.logging import disable_progress_bar

        set_seed(config.seed)
        # The run has its own progress bar.
        disable_progress_bars()
        disable_progress_bar()
        return register(run, stage.run(config, run))
