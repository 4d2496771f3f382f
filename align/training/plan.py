"""The checks and the plan of a run before its weights are loaded.

The plan gives rows, tokens, steps, trainable parameters and memory.
"""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from align.config import LoraSettings, StageConfig, write
from align.data.rendering.template_notices import fold_when_asked, notice_lines
from align.data.sources import require_files
from align.data.token_cache import TokenisedDataset
from align.errors import MachineError, UsageError
from align.models.adapter_config import ALL_LINEAR
from align.models.adapter_kinds import read_adapter_settings
from align.models.adapters import refuse_reward, tokenizer_checkpoint
from align.models.base_files import load_text_config
from align.models.heads import check_score_head
from align.models.start_checks import check_files, check_models, count_trainable
from align.models.tokenizers import load_tokenizer
from align.registry import Checkpoint, Registry
from align.training.ranks import Ranks
from align.training.stage import Stage
from align.training.training_data import TrainingData, pack_rows
from align.training.trl_bridge import check_passthrough

if TYPE_CHECKING:
    from align.models.memory import LossHead

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
    check_models(config, registry, started)
    outline = stage.outline if stage.outline and not started else None
    start = outline(config, data.train) if outline else _outline(stage, config, registry, started["model"])
    notes = [*find_unused_settings(config, started.get("model")), *fold_when_asked(start.tokenizer, config.on_refused)]
    # Where there is no registry yet, a plan makes none.
    has_registry = registry.root.is_dir()
    with nullcontext(registry.cache_dir / "tokens") if has_registry else TemporaryDirectory() as cache:
        tokens = data.tokenise_records(data.train, start.tokenizer, Path(cache))
        notes += notice_lines(tokens, len(tokens.rows), start.tokenizer)
        reasons = data.train.dropped | tokens.dropped
        dropped = [f"{count} dropped: {reason}" for reason, count in reasons.items()]
        lines = {
            "start": start.start,
            "data": f"{data.train.name}: {len(data.train.records)} rows, {', '.join(dropped) or 'none dropped'}",
            "tokens": _describe_tokens(config, tokens),
            "steps": _describe_steps(config, tokens),
            "trainable": f"{start.trainable:,} of {start.total:,} parameters ({start.trainable / start.total:.2%})",
        }
        if started:
            lines["memory"] = _describe_memory(stage, config, registry, started["model"], tokens)
        if data.held_out is not None:
            rows = data.tokenise_records(data.held_out, start.tokenizer, Path(cache))
            lines["held out"] = f"{data.held_out.name}: {len(rows.rows)} rows, {rows.tokens} tokens"
    for key, text in [*lines.items(), *(("note", note) for note in notes)]:
        write(f"{key:<10} {text}")


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
    return ", ".join([*parts, f"{_padding_share(config, tokens):.0%} padding beside them"])


def _describe_memory(
    stage: Stage, config: StageConfig, registry: Registry, parent: Checkpoint, tokens: TokenisedDataset
) -> str:
    """Describe the peak memory of a training step by part."""
    from align.models.memory import TrainingPass, estimate_memory

    base = registry.resolve_base(parent) if parent.is_adapter else parent
    lengths = tokens.lengths()
    sampled = config.row_length - config.token_length  # the longest completion that training samples after a row
    longest = config.row_length if _packs(config) else int(lengths.max()) + sampled
    head: LossHead = "packed" if stage.head == "fused" and getattr(config, "fast_path", False) else stage.head
    rows = config.per_device_train_batch_size * lengths.shape[1]
    step = TrainingPass(rows, longest, head, 1 - _padding_share(config, tokens))
    sizes = estimate_memory(parent, base, config, step)
    total = sizes.pop("total")
    shown = ", ".join(f"{part} {_mebibytes(size)}" for part, size in sizes.items() if size >= 2**19)
    return f"about {_mebibytes(total)} beside the bare process: {shown}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _describe_steps(config: StageConfig, tokens: TokenisedDataset) -> str:
    rows = len(pack_rows(tokens.rows, config.max_length) if _packs(config) else tokens.rows)
    steps = math.ceil(math.ceil(rows / config.rows_per_step) * config.num_train_epochs)
    return f"{steps if config.max_steps < 0 else config.max_steps} of {config.rows_per_step} rows"


def _packs(config: StageConfig) -> bool:
    return bool(getattr(config, "packing", False))


def _padding_share(config: StageConfig, tokens: TokenisedDataset) -> float:
    """Return the share of padding in batches of shuffled rows, each padded to its longest row."""
    import numpy

    if _packs(config):
        return 0.0
    lengths = numpy.random.default_rng(config.seed).permutation(tokens.lengths())
    size = config.per_device_train_batch_size
    batches = numpy.split(lengths, range(size, len(lengths), size))
    padded = sum(int(batch.max()) * batch.size for batch in batches)
    return 1 - float(lengths.sum()) / padded
