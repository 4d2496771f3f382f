"""The checks and the plan of a run before its weights are loaded.

The plan gives rows, tokens, steps, trainable parameters and memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.config import LoraSettings, StageConfig, write
from align.data.rendering.template_notices import fold_when_asked, notice_lines
from align.data.sources import require_files
from align.data.token_cache import TokenisedDataset
from align.errors import AlignError, MachineError, UsageError
from align.models.adapter_config import ALL_LINEAR
from align.models.adapter_kinds import read_adapter_settings
from align.models.adapters import refuse_reward, tokenizer_checkpoint
from align.models.base_files import load_text_config
from align.models.heads import check_score_head
from align.models.quiet_libraries import import_libraries
from align.models.start_checks import check_files, check_models, count_trainable
from align.models.tokenizers import load_tokenizer
from align.registry import Checkpoint, Registry
from align.training.advice import advise, free_memory, seconds_text
from align.training.planned_step import PlannedStep, count_steps, packs, padding_share
from align.training.ranks import Ranks
from align.training.stage import Stage
from align.training.step_time import StepTime, StepTimer
from align.training.training_data import TrainingData, pack_rows
from align.training.trl_bridge import check_passthrough
from align.waiting import waiting

_BOTH = "pip install {0}, or 'align[{1}]'"
_INSTALL = {name: _BOTH.format(name, "trackers") for name in ("wandb", "mlflow", "trackio")} | {
    "tensorboard": _BOTH.format("tensorboard", "tensorboard"),
    "comet_ml": "pip install comet_ml",
}


@dataclass(frozen=True)
class Outline:
    """The start of a run: its name, its tokenizer, and its trainable and total parameters."""

    start: str
    tokenizer: Any
    trainable: int
    total: int


def preflight(stage: Stage, config: StageConfig, registry: Registry) -> dict[str, Checkpoint]:
    """Check settings against each other and the registry, and return the checkpoints that they name."""
    check_passthrough(stage, config)
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise MachineError(f"report_to={tracker}: the package {tracker} is not installed; {_INSTALL[tracker]}")
    require_files([*config.data_specs, *config.eval_specs])
    checkpoints = {key: registry.resolve(reference) for key, reference in config.references.items()}
    start = checkpoints.get("model")
    if start is not None and start.kind == "reward":
        if stage.produces != "reward":
            refuse_reward(start)
        check_score_head(start)
    check_files(config, registry, checkpoints)
    if config.name in registry.names() and (newest := registry.resolve(config.name)).kind != stage.kind(config):
        # With versions of two kinds `model=NAME` would change its meaning.
        raise UsageError(
            f"name={config.name}: {newest.reference} is a {newest.kind} and this makes a {stage.kind(config)}; "
            "choose another name"
        )
    return checkpoints


def find_unused_settings(config: StageConfig, start: Checkpoint | None) -> list[str]:
    """Return a line on the settings of `lora` that an adapter which is trained further does not take."""
    lora = config.new_adapter
    if start is None or not start.is_adapter or config.fresh_adapter or not isinstance(lora, LoraSettings):
        return []
    own = {key.removeprefix("lora_"): value for key, value in read_adapter_settings(start).items()}
    asked = lora.model_dump(include=lora.model_fields_set)
    for settings in (own, asked):
        if isinstance(settings.get("target_modules"), list):
            settings["target_modules"] = sorted(settings["target_modules"])
    unused = [f"lora.{key}" for key, value in asked.items() if value not in (ALL_LINEAR, own.get(key))]
    what = "is an adapter, which is trained further with its own settings"
    return [f"{start.reference} {what}; {', '.join(unused)} not used"] if unused else []


def print_plan(stage: Stage, config: StageConfig, registry: Registry) -> None:
    """Check start and data as a run would and print the plan; rows are tokenised, and cached for the run.

    Raises what the run would raise before it loads weights.
    """
    started = preflight(stage, config, registry)
    data = TrainingData(stage, config, registry, Ranks(), notify=lambda _: None)
    data.read()
    import_libraries(*stage.libraries)
    check_models(config, registry, started)
    outline = stage.outline if stage.outline and not started else None
    start = outline(config, data.train) if outline else _outline(stage, config, registry, started["model"])
    notes = [*find_unused_settings(config, started.get("model")), *fold_when_asked(start.tokenizer, config.on_refused)]
    # Where there is no registry yet, a plan makes none.
    has_registry = registry.root.is_dir()
    with nullcontext(registry.cache_dir / "tokens") if has_registry else TemporaryDirectory() as cache:
        tokens = data.tokenise_records(data.train, start.tokenizer, Path(cache))
        steps = _count_steps(config, tokens)
        config.refuse_endless_warmup(steps)
        notes += notice_lines(tokens, len(tokens.rows), start.tokenizer)
        reasons = data.train.dropped | tokens.dropped
        dropped = [f"{count} dropped: {reason}" for reason, count in reasons.items()]
        step = PlannedStep(stage, config, registry, started.get("model"), tokens)
        lines = {
            "start": start.start,
            "data": f"{data.train.name}: {len(data.train.records)} rows, {', '.join(dropped) or 'none dropped'}",
            "tokens": _describe_tokens(config, tokens),
            "steps": f"{steps} of {config.rows_per_step} rows",
            "trainable": f"{start.trainable:,} of {start.total:,} parameters ({start.trainable / start.total:.2%})",
        }
        free = free_memory()
        if started:
            lines["memory"] = _describe_memory(step.memory(config), free)
        if data.held_out is not None:
            rows = data.tokenise_records(data.held_out, start.tokenizer, Path(cache))
            lines["held out"] = f"{data.held_out.name}: {len(rows.rows)} rows, {rows.tokens} tokens"
        for key, text in [*lines.items(), *(("note", note) for note in notes)]:
            write(f"{key:<10} {text}")
        timer = StepTimer(step, data.train, tokens.rows, steps, start.total, free)
        for line in _estimate_time(timer, started):
            write(line)


def _estimate_time(timer: StepTimer, started: dict[str, Checkpoint]) -> Iterator[str]:
    """Yield the line on the time and the advice; what cannot be timed is said so."""
    took = None
    with waiting("timing a few steps with fewer layers and random weights"):
        try:
            took = timer.estimate()
            text = _describe_time(took)
        except AlignError as error:
            text = f"not estimated: {error}"
        yield f"{'time':<10} {text}"
        for line in advise(timer.step, started, timer.free, timer if took else None, took) if started else ():
            yield f"{'advice':<10} {line}"


def _describe_time(took: StepTime) -> str:
    reference = f" ({seconds_text(took.before)} of it the reference's pass before the first)" if took.before else ""
    sampled = f"; about {took.new_tokens_per_second:.0f} new tokens a second" if took.new_tokens_per_second else ""
    between = f"{seconds_text(took.low)} to {seconds_text(took.high)}"
    times = f"about {seconds_text(took.seconds)} a step ({between}), {seconds_text(took.total)} in all"
    return f"{times}{reference}{sampled}; an estimate from a few steps on this machine, as busy as it is now"


def _outline(stage: Stage, config: StageConfig, registry: Registry, parent: Checkpoint) -> Outline:
    base = registry.resolve_base(parent) if parent.is_adapter else parent
    trainable, total = count_trainable(parent, base, config)
    if stage.head == "score":
        width = load_text_config(base).hidden_size
        trainable, total = trainable + width, total + width
    tokenizer = load_tokenizer(tokenizer_checkpoint(parent, base), write)
    return Outline(f"{parent.reference} (base {base.reference})", tokenizer, trainable, total)


def _describe_tokens(config: StageConfig, tokens: TokenisedDataset) -> str:
    parts = [f"{tokens.tokens} an epoch"]
    if tokens.trained_tokens:
        parts.append(f"{tokens.trained_tokens} of them trained ({tokens.trained_tokens / tokens.tokens:.0%})")
    return ", ".join([*parts, f"{padding_share(config, tokens.lengths()):.0%} padding beside them"])


def _describe_memory(sizes: dict[str, int], free: int) -> str:
    """Describe the peak memory of a training step by part, beside what this machine has."""
    shown = ", ".join(f"{part} {_mebibytes(size)}" for part, size in sizes.items() if part != "total" and size >= 2**19)
    return f"about {_mebibytes(sizes['total'])} beside the bare process, of {_mebibytes(free)} free: {shown}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _count_steps(config: StageConfig, tokens: TokenisedDataset) -> int:
    rows = len(pack_rows(tokens.rows, config.max_length) if packs(config) else tokens.rows)
    return count_steps(config, rows)
