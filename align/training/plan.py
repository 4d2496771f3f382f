"""What a run would do, without loading a weight: rows, tokens, steps, trainable parameters and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, write
from align.data import RecordSet, load_records
from align.data.rendering.fold_system import fold_when_asked
from align.data.rendering.template_notices import notice_lines
from align.data.set_checks import refuse_leak
from align.data.token_cache import TokenisedDataset
from align.data.tokenise import tokenise
from align.models.adapters import tokenizer_home
from align.models.counting import count_trainable, text_config
from align.models.memory import LossHead, TrainingPass, estimate_memory
from align.models.start_checks import check_models
from align.models.tokenizers import load_tokenizer
from align.training.preflight import preflight

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry
    from align.training.stage import Stage


@dataclass(frozen=True)
class Outline:
    """What a run starts from: a line about it, its tokenizer, and its trainable and total parameters."""

    start: str
    tokenizer: Any
    trainable: int
    total: int


def print_plan(stage: Stage, config: StageConfig, registry: Registry) -> None:
    """Check start and data as a run would and print the plan; rows are tokenised, and kept for the run.

    Raises what the run would raise before it loads weights.
    """
    started = preflight(stage, config, registry)
    found = _load(stage, config, registry, config.data)
    check_models(config, registry, started)
    outline = (
        stage.outline(config, found) if stage.outline and not started else _outline(stage, config, registry, started)
    )
    notes = fold_when_asked(outline.tokenizer, config.on_refused)
    tokens = _tokenise(stage, config, registry, found, outline.tokenizer)
    notes += notice_lines(tokens, len(tokens.rows), outline.tokenizer)
    lines = {
        "start": outline.start,
        "data": f"{found.name}: {len(found.records)} rows, {_tell_dropped(found.dropped | tokens.dropped)}",
        "tokens": _tell_tokens(config, tokens),
        "steps": _tell_steps(config, _count_rows(config, tokens)),
        "trainable": f"{outline.trainable:,} of {outline.total:,} parameters ({outline.trainable / outline.total:.2%})",
    }
    if started:
        lines["memory"] = _tell_memory(stage, config, registry, started["model"], tokens)
    if config.eval_data is not None:
        held_out = _load(stage, config, registry, config.eval_data)
        refuse_leak(found, held_out)
        rows = _tokenise(stage, config, registry, held_out, outline.tokenizer)
        lines["held out"] = f"{held_out.name}: {len(rows.rows)} rows, {rows.tokens} tokens"
    for key, text in [*lines.items(), *(("note", note) for note in notes)]:
        write(f"{key:<10} {text}")


def _load(stage: Stage, config: StageConfig, registry: Registry, spec: str | list[str]) -> RecordSet:
    return load_records(spec, view=stage.view, on_bad_row=config.on_bad_row, roots={"registry": registry.root})


def _outline(stage: Stage, config: StageConfig, registry: Registry, started: dict[str, Checkpoint]) -> Outline:
    parent = started["model"]
    base = registry.resolve_base(parent) if parent.is_adapter else parent
    trainable, total = count_trainable(parent, base, config)
    if stage.head == "score":
        width = text_config(base).hidden_size
        trainable, total = trainable + width, total + width
    tokenizer = load_tokenizer(tokenizer_home(parent, base), write)
    return Outline(f"{parent.reference} (base {base.reference})", tokenizer, trainable, total)


def _tokenise(
    stage: Stage, config: StageConfig, registry: Registry, found: RecordSet, tokenizer: Any
) -> TokenisedDataset:
    """The rows of the run, kept for it, unless there is no registry yet: a plan does not make one."""
    plan, processes = stage.token_plan(config), getattr(config, "dataset_num_proc", None)
    if registry.root.is_dir():
        return tokenise(found, tokenizer, plan, cache=registry.cache_dir / "tokens", processes=processes)
    with TemporaryDirectory() as folder:
        return tokenise(found, tokenizer, plan, cache=Path(folder), processes=processes)


def _tell_dropped(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} dropped: {reason}" for reason, count in dropped.items()) or "none dropped"


def _tell_tokens(config: StageConfig, tokens: TokenisedDataset) -> str:
    parts = [f"{tokens.tokens} an epoch"]
    if tokens.trained_tokens:
        parts.append(f"{tokens.trained_tokens} of them trained ({tokens.trained_tokens / tokens.tokens:.0%})")
    padding = 0.0 if _packs(config) else padding_share(tokens, config.per_device_train_batch_size, config.seed)
    return ", ".join([*parts, f"{padding:.0%} padding beside them"])


def _tell_memory(
    stage: Stage, config: StageConfig, registry: Registry, parent: Checkpoint, tokens: TokenisedDataset
) -> str:
    """The peak of a training step by part, in a process that does nothing else."""
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


def _tell_steps(config: StageConfig, rows: int) -> str:
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
    """The share of a batch that is padding, when rows are shuffled and padded to the longest of their batch."""
    import numpy

    lengths = numpy.random.default_rng(seed).permutation(tokens.lengths())
    batches = numpy.split(lengths, range(batch_size, len(lengths), batch_size))
    padded = sum(int(batch.max()) * batch.size for batch in batches)
    return 1 - float(lengths.sum()) / padded
