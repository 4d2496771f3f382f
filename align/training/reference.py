"""The log-probabilities of the reference as columns of a trainer's rows, cached in the registry."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from align.config import TrainerStageConfig
from align.models.adapters import digests_of_base
from align.models.loading import Precision
from align.models.packed import use_fast_path
from align.models.reference_cache import AnswerTokens, ReferenceCache, make_batches, reference_key, score_answers

if TYPE_CHECKING:
    from datasets import Dataset

    from align.registry import Checkpoint
    from align.training.run import Run

PAIRS = {"ref_chosen_logps": "chosen_ids", "ref_rejected_logps": "rejected_ids"}
"""the columns in which TRL's DPO trainer reads the reference, and the columns of the completions they are about"""

UNPAIRED = {"ref_logps": "completion_ids", "ref_KL_logps": "KL_completion_ids"}
"""the same for its KTO trainer"""

_BATCH_RATIO = 4
"""tokens of a batch without gradients, over those of the largest training batch"""
_SAVE_EVERY_S = 60.0


def add_reference_logps(run: Run, trainer: Any, base: Checkpoint, columns: Mapping[str, str]) -> None:
    """Add the reference's log-probabilities to the rows of a trainer, which then reads them instead of a model.

    The trainer's model has a frozen adapter `ref`. What the cache lacks is computed in large batches, long rows with
    long ones.
    """
    if isinstance(run.config, TrainerStageConfig) and run.config.fast_path:
        use_fast_path(trainer.model, run.print_line)
    splits = [rows for rows in (trainer.train_dataset, trainer.eval_dataset) if rows is not None]
    answers = [_select_answers(rows, columns, trainer.args.max_length) for rows in splits]
    logps = _load_logps(run, trainer, base, [answer for part in answers for answer in part])
    for number, rows in enumerate(splits):
        values = [logps[answer.digest] for answer in answers[number]]
        for position, column in enumerate(_present(rows, columns)):
            rows = rows.add_column(column, values[position * len(rows) : (position + 1) * len(rows)])
        splits[number] = rows
    trainer.train_dataset, trainer.eval_dataset = splits[0], splits[1] if len(splits) > 1 else None
    trainer.precompute_ref_logps = True


def _present(rows: Dataset, columns: Mapping[str, str]) -> list[str]:
    return [column for column, source in columns.items() if source in rows.column_names]


def _select_answers(rows: Dataset, columns: Mapping[str, str], max_length: int | None) -> list[AnswerTokens]:
    """Return the answers of each column one after the other, cut as the trainer's collator cuts them."""
    import numpy

    table = rows.with_format("arrow")[:]
    prompts = _split_lists(table["prompt_ids"])
    return [
        AnswerTokens(numpy.concatenate([prompt, answer])[:max_length].astype(numpy.int32), len(prompt))
        for column in _present(rows, columns)
        for prompt, answer in zip(prompts, _split_lists(table[columns[column]]), strict=True)
    ]


def _split_lists(column: Any) -> list[Any]:
    """Return the rows of an Arrow column of lists as NumPy arrays."""
    import numpy

    arrays = []
    for chunk in column.chunks:
        values, offsets = chunk.flatten().to_numpy(zero_copy_only=False), numpy.asarray(chunk.offsets)
        arrays += [values[begin:end] for begin, end in pairwise(offsets - offsets[0])]
    return arrays


def _load_logps(run: Run, trainer: Any, base: Checkpoint, answers: Sequence[AnswerTokens]) -> dict[bytes, float]:
    """Return the summed log-probabilities of every answer, by its digest."""
    adapter = run.parent if run.parent.is_adapter else None
    key = reference_key(digests_of_base(base, run.registry), adapter, _describe_arithmetic(run, trainer))
    cache = ReferenceCache(run.registry.cache_dir / "reference", key)
    wanted = {answer.digest: answer for answer in answers}
    logps, ranks = cache.read(), trainer.accelerator
    # All ranks have read before any adds, so that they divide the same list among themselves.
    ranks.wait_for_everyone()
    missing = [answer for digest, answer in wanted.items() if digest not in logps]
    run.print_line(f"reference log-probabilities: {len(wanted) - len(missing)} of {len(wanted)} answers in the cache")
    logps |= _compute_logps(run, trainer, cache, missing[ranks.process_index :: ranks.num_processes])
    ranks.wait_for_everyone()
    logps |= cache.read() if ranks.num_processes > 1 else {}
    # Where the ranks share no disk, each computes the rest as well.
    return logps | _compute_logps(run, trainer, cache, [answer for answer in missing if answer.digest not in logps])


def _describe_arithmetic(run: Run, trainer: Any) -> dict[str, Any]:
    """Return what decides, besides the weights, which numbers are computed."""
    arguments = {name: getattr(trainer.args, name, None) for name in ("bf16", "fp16", "tf32")}
    return arguments | {
        "quantization": run.config.quantization,
        "weights_bf16": Precision.of(run.config).uses_bf16,
        "device": trainer.model.device.type,
    }


def _compute_logps(
    run: Run, trainer: Any, cache: ReferenceCache, answers: Sequence[AnswerTokens]
) -> dict[bytes, float]:
    """Score answers under the adapter `ref`, and save the scores into the cache while they are computed."""
    if not answers:
        return {}
    from trl.trainer.utils import use_adapter

    started = saved = time.monotonic()
    capacity = _BATCH_RATIO * 2 * trainer.args.per_device_train_batch_size * max(len(one.ids) for one in answers)
    logps: dict[bytes, float] = {}
    new: list[tuple[bytes, float]] = []
    reference = "ref" if "ref" in trainer.model.peft_config else None  # without it TRL asks the base itself
    with use_adapter(trainer.model, reference), trainer.accelerator.autocast():
        for positions in make_batches(answers, capacity):
            batch = [answers[position] for position in positions]
            new += zip((answer.digest for answer in batch), score_answers(trainer.model, batch), strict=True)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                saved = time.monotonic()
                cache.add(new)
                logps, new = logps | dict(new), []
    cache.add(new)
    logps |= dict(new)
    tokens, seconds = sum(len(answer.ids) for answer in answers), time.monotonic() - started
    run.print_line(f"reference log-probabilities: {len(logps)} answers computed, {tokens} tokens in {seconds:.1f} s")
    return logps
