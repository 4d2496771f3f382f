"""The plan of a run, made without loading weights: rows, tokens, steps, trainable parameters and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, write
from align.data.rendering.fold_system import fold_when_asked
from align.data.rendering.template_notices import notice_lines
from align.data.token_cache import TokenisedDataset
from align.models.adapters import tokenizer_checkpoint
from align.models.base_files import load_text_config
from align.models.counting import count_trainable
from align.models.memory import LossHead, TrainingPass, estimate_memory
from align.models.start_checks import check_models
from align.models.tokenizers import load_tokenizer
from align.training.preflight import preflight
from align.training.ranks import Ranks
from align.training.training_data import TrainingData

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage


@dataclass(frozen=True)
class Outline:
    """The start of a run: its name, its tokenizer, and its trainable and total parameters."""

    start: str
    tokenizer: Any
    trainable: int
    total: int


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
    notes = fold_when_asked(start.tokenizer, config.on_refused)
    with _token_cache(registry) as cache:
        tokens = data.tokenise_records(data.train, start.tokenizer, cache)
        notes += notice_lines(tokens, len(tokens.rows), start.tokenizer)
        dropped = data.train.dropped | tokens.dropped
        lines = {
            "start": start.start,
            "data": f"{data.train.name}: {len(data.train.records)} rows, {_describe_dropped(dropped)}",
            "tokens": _describe_tokens(config, tokens),
            "steps": _describe_steps(config, _count_rows(config, tokens)),
            "trainable": f"{start.trainable:,} of {start.total:,} parameters ({start.trainable / start.total:.2%})",
        }
        if started:
            lines["memory"] = _describe_memory(stage, config, registry, started["model"], tokens)
        if data.held_out is not None:
            rows = data.tokenise_records(data.held_out, start.tokenizer, cache)
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


@contextmanager
def _token_cache(registry: Registry) -> Iterator[Path]:
    """Yield the registry's cache of tokens, or a temporary one where there is no registry yet: a plan makes none."""
    if registry.root.is_dir():
        yield registry.cache_dir / "tokens"
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def _describe_dropped(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} dropped: {reason}" for reason, count in dropped.items()) or "none dropped"


def _describe_tokens(config: StageConfig, tokens: TokenisedDataset) -> str:
    parts = [f"{tokens.tokens} an epoch"]
    if tokens.trained_tokens:
        parts.append(f"{tokens.trained_tokens} of them trained ({tokens.trained_tokens / tokens.tokens:.0%})")
    padding = 0.0 if _packs(config) else padding_share(tokens, config.per_device_train_batch_size, config.seed)
    return ", ".join([*parts, f"{padding:.0%} padding beside them"])


def _describe_memory(
    stage: Stage, config: StageConfig, registry: Registry, parent: Checkpoint, tokens: TokenisedDataset
) -> str:
    """Describe the peak memory of a training step by part."""
    base = registry.resolve_base(parent) if parent.is_adapter else parent
    lengths = tokens.lengths()
    longest = config.row_length if _packs(config) else int(lengths.max()) + config.written_length
    filled = 1.0 if _packs(config) else 1 - padding_share(tokens, config.per_device_train_batch_size, config.seed)
    head: LossHead = "packed" if stage.head == "fused" and getattr(config, "fast_path", False) else stage.head
    rows = config.per_device_train_batch_size * lengths.shape[1]
    parts = estimate_memory(parent, base, config, TrainingPass(rows, longest, head, filled))
    total = parts.pop("total")
    shown = ", ".join(f"{part} {_mebibytes(size)}" for part, size in parts.items() if size >= 2**19)
    return f"about {_mebibytes(total)} beside the bare process: {shown}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _describe_steps(config: StageConfig, rows: int) -> str:
    steps = math.ceil(math.ceil(rows / config.rows_per_step) * config.num_train_epochs)
    return f"{steps if config.max_steps < 0 else config.max_steps} of {config.rows_per_step} rows"


def _count_rows(config: StageConfig, tokens: TokenisedDataset) -> int:
    if not _packs(config):
        return len(tokens.rows)
    from align.training.packing import pack_rows

    return len(pack_rows(tokens.rows, config.max_length))


def _packs(config: StageConfig) -> bool:
    return bool(getattr(config, "packing", False))


def padding_share(tokens: TokenisedDataset, batch_size: int, seed: int) -> float:
    """Return the share of padding in batches of shuffled rows, each padded to its longest row."""
    import numpy

    lengths = numpy.random.default_rng(seed).permutation(tokens.lengths())
    batches = numpy.split(lengths, range(batch_size, len(lengths), batch_size))
    padded = sum(int(batch.max()) * batch.size for batch in batches)
    return 1 - float(lengths.sum()) / padded
