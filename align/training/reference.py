"""Giving a TRL trainer what its reference says about every row, from the registry's cache where it is known."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from align.config import TrainerStageConfig
from align.models.adapters import digests_of_base
from align.models.loading import Precision
from align.models.packed import use_fast_path
from align.models.reference_cache import AnswerTokens, ReferenceCache, batches, reference_key, score_answers

if TYPE_CHECKING:
    from datasets import Dataset

    from align.registry import Checkpoint
    from align.training.run import Run

PAIRS = {"ref_chosen_logps": "chosen_ids", "ref_rejected_logps": "rejected_ids"}
"""the columns in which TRL's DPO trainer reads the reference, and the answers they are about"""

UNPAIRED = {"ref_logps": "completion_ids", "ref_KL_logps": "KL_completion_ids"}
"""the same for its KTO trainer"""

_LARGER = 4
"""a batch without gradients may hold so many times the tokens of the largest training batch"""
_SECONDS = 60.0
"""what was computed is kept at least this often"""


def give_reference(run: Run, trainer: Any, base: Checkpoint, columns: Mapping[str, str]) -> None:
    """Give the rows of a trainer the log-probabilities of its reference, and let it read them instead of a model.

    Call it when the trainer has its final rows and its model a frozen adapter `ref`. What the cache does not know is
    computed in large batches, long rows with long ones.
    """
    if isinstance(run.config, TrainerStageConfig) and run.config.fast_path:
        use_fast_path(trainer.model, run.say)
    answers = {split: _answers(rows, columns, trainer) for split, rows in _splits(trainer)}
    known = _known(run, trainer, base, [answer for each in answers.values() for answer in each])
    for split, rows in _splits(trainer):
        values = [known[answer.digest] for answer in answers[split]]
        for place, column in enumerate(_present(rows, columns)):
            rows = rows.add_column(column, values[place * len(rows) : (place + 1) * len(rows)])
        setattr(trainer, split, rows)
    trainer.precompute_ref_logps = True


def _splits(trainer: Any) -> list[tuple[str, Dataset]]:
    splits = ((name, getattr(trainer, name)) for name in ("train_dataset", "eval_dataset"))
    return [(name, rows) for name, rows in splits if rows is not None]


def _present(rows: Dataset, columns: Mapping[str, str]) -> list[str]:
    return [column for column, source in columns.items() if source in rows.column_names]


def _answers(rows: Dataset, columns: Mapping[str, str], trainer: Any) -> list[AnswerTokens]:
    """The answers of each column one after the other, cut as the trainer's collator cuts them."""
    import numpy

    table = rows.with_format("arrow")[:]
    prompts = _lists(table["prompt_ids"])
    longest = trainer.args.max_length
    return [
        AnswerTokens(numpy.concatenate([prompt, answer])[:longest].astype(numpy.int32), len(prompt))
        for column in _present(rows, columns)
        for prompt, answer in zip(prompts, _lists(table[columns[column]]), strict=True)
    ]


def _lists(column: Any) -> list[Any]:
    """The rows of an Arrow column of lists as NumPy arrays."""
    import numpy

    found = []
    for chunk in column.chunks:
        values, offsets = chunk.flatten().to_numpy(zero_copy_only=False), numpy.asarray(chunk.offsets)
        found += [values[begin:end] for begin, end in pairwise(offsets - offsets[0])]
    return found


def _known(run: Run, trainer: Any, base: Checkpoint, answers: Sequence[AnswerTokens]) -> dict[bytes, float]:
    """The sum of log-probabilities of every answer, by its digest."""
    adapter = run.parent if run.parent.is_adapter else None
    key = reference_key(digests_of_base(base, run.registry), adapter, _arithmetic(run, trainer))
    cache = ReferenceCache(run.registry.cache_dir / "reference", key)
    wanted = {answer.digest: answer for answer in answers}
    known, world = cache.read(), trainer.accelerator
    # Everyone has read before anyone adds, so that the processes of a run share the same list out among them.
    world.wait_for_everyone()
    missing = [answer for digest, answer in wanted.items() if digest not in known]
    run.say(f"reference log-probabilities: {len(wanted) - len(missing)} of {len(wanted)} answers in the cache")
    known |= _compute(run, trainer, cache, missing[world.process_index :: world.num_processes])
    world.wait_for_everyone()
    known |= cache.read() if world.num_processes > 1 else {}
    # Where the processes share no disk, each computes the rest as well.
    return known | _compute(run, trainer, cache, [answer for answer in missing if answer.digest not in known])


def _arithmetic(run: Run, trainer: Any) -> dict[str, Any]:
    """What decides, besides the weights, which numbers come out."""
    asked = {name: getattr(trainer.args, name, None) for name in ("bf16", "fp16", "tf32")}
    return asked | {
        "quantization": run.config.quantization,
        "weights_bf16": Precision.of(run.config).uses_bf16,
        "device": trainer.model.device.type,
    }


def _compute(run: Run, trainer: Any, cache: ReferenceCache, answers: Sequence[AnswerTokens]) -> dict[bytes, float]:
    """Score answers under the adapter `ref` and keep what comes out."""
    if not answers:
        return {}
    from trl.trainer.utils import use_adapter

    started = kept = time.monotonic()
    found: dict[bytes, float] = {}
    new: list[tuple[bytes, float]] = []
    with use_adapter(trainer.model, "ref"), trainer.accelerator.autocast():
        for places in batches(answers, _capacity(trainer, answers)):
            some = [answers[place] for place in places]
            new += zip((answer.digest for answer in some), score_answers(trainer.model, some), strict=True)
            if time.monotonic() - kept > _SECONDS:
                kept = time.monotonic()
                found |= _keep(cache, new)
    found |= _keep(cache, new)
    tokens, seconds = sum(len(answer.ids) for answer in answers), time.monotonic() - started
    run.say(f"reference log-probabilities: {len(found)} answers computed, {tokens} tokens in {seconds:.1f} s")
    return found


def _keep(cache: ReferenceCache, new: list[tuple[bytes, float]]) -> dict[bytes, float]:
    done = dict(new)
    cache.add(new)
    new.clear()
    return done


def _capacity(trainer: Any, answers: Iterable[AnswerTokens]) -> int:
    longest = max(len(answer.ids) for answer in answers)
    return _LARGER * 2 * int(trainer.args.per_device_train_batch_size) * longest
