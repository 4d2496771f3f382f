"""The reference that DPO, KTO and GRPO hold a policy to: its cached log-probabilities, and a proof at step 1.

Log-probabilities become columns of a trainer's rows and are cached in the registry. The numbers of step 1 are known,
because the policy equals its reference there.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import TrainerCallback

from align.config import TrainerStageConfig
from align.errors import IntegrityError
from align.models.adapters import digests_of_base
from align.models.loading import Precision
from align.models.packed import use_fast_path
from align.models.reference_cache import AnswerTokens, ReferenceCache, make_batches, reference_key, score_answers
from align.registry import Checkpoint
from align.training.run import Run

PAIRS = {"ref_chosen_logps": "chosen_ids", "ref_rejected_logps": "rejected_ids"}
"""the columns in which TRL's DPO trainer reads the reference, and the columns of the completions they are about"""

UNPAIRED = {"ref_logps": "completion_ids", "ref_KL_logps": "KL_completion_ids"}
"""the same for its KTO trainer"""

LOGPS = ("logps/chosen", "logps/rejected")
"""the mean log-probabilities of completions that TRL logs; a batch without good or bad ones logs one of them"""

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
    present = [[column for column, source in columns.items() if source in rows.column_names] for rows in splits]
    answers = [
        _select_answers(rows, [columns[column] for column in names], trainer.args.max_length)
        for rows, names in zip(splits, present, strict=True)
    ]
    logps = _load_logps(run, trainer, base, [answer for part in answers for answer in part])
    for number, rows in enumerate(splits):
        values = [logps[answer.digest] for answer in answers[number]]
        for position, column in enumerate(present[number]):
            rows = rows.add_column(column, values[position * len(rows) : (position + 1) * len(rows)])
        splits[number] = rows
    trainer.train_dataset, trainer.eval_dataset = splits[0], splits[1] if len(splits) > 1 else None
    trainer.precompute_ref_logps = True


def _select_answers(rows: Dataset, sources: Sequence[str], max_length: int | None) -> list[AnswerTokens]:
    """Return the answers of each column one after the other, cut as the trainer's collator cuts them."""
    import numpy

    table = rows.with_format("arrow")[:]
    prompts = _split_lists(table["prompt_ids"])
    return [
        AnswerTokens(numpy.concatenate([prompt, answer])[:max_length].astype(numpy.int32), len(prompt))
        for source in sources
        for prompt, answer in zip(prompts, _split_lists(table[source]), strict=True)
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
    # What decides, besides the weights, which numbers are computed.
    arithmetic = {name: getattr(trainer.args, name, None) for name in ("bf16", "fp16", "tf32")} | {
        "quantization": run.config.quantization,
        "weights_bf16": Precision.of(run.config).uses_bf16,
        "device": trainer.model.device.type,
    }
    adapter = run.parent if run.parent.is_adapter else None
    key = reference_key(digests_of_base(base, run.registry), adapter, arithmetic)
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


class Rounding(NamedTuple):
    """The largest difference of two passes of one model on the log-probability of a completion.

    Batches of other shapes are rounded otherwise. In single precision 3e-8 of a log-probability was measured, in bf16
    4e-5 with a small model; a reference that is another model is nats away.
    """

    nats: float
    share: float
    """of the log-probability, added to `nats`"""
    exact: bool
    """whether arithmetic is single precision throughout"""

    @classmethod
    def of(cls, config: TrainerStageConfig) -> Rounding:
        """Return the rounding of a run's arithmetic."""
        reduced = any(config.trainer.get(key) for key in ("fp16", "tf32", "torch_compile"))
        mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
        exact = not (Precision.of(config).uses_bf16 or config.quantization == "int8" or reduced or mixed)
        return cls(1e-4, 1e-6, True) if exact else cls(0.25, 1e-2, False)


@dataclass(frozen=True)
class Expected:
    """A number of step 1: `value`, give or take `within` and `share` of the largest of the numbers logged as `of`.

    Log-probabilities are sums over tokens, so what rounding adds to them grows with their size.
    """

    value: float
    within: float
    share: float = 0.0
    of: tuple[str, ...] = ()

    def is_met_by(self, logged: float, numbers: Mapping[str, float]) -> bool:
        """Return whether a logged number is as expected; one that is not finite is left to the guard."""
        size = max((abs(numbers[key]) for key in self.of if key in numbers), default=0.0)
        return not math.isfinite(logged) or abs(logged - self.value) <= self.within + self.share * size


def expect_no_rewards(beta: float, rounding: Rounding) -> dict[str, Expected]:
    """Return the rewards that DPO and KTO log when every log-ratio is 0."""
    within, share = beta * rounding.nats, beta * rounding.share
    return {f"rewards/{side}": Expected(0.0, within, share, (f"logps/{side}",)) for side in ("chosen", "rejected")}


@dataclass
class FirstStep(TrainerCallback):
    """Raises IntegrityError when step 1 logs other numbers than expected; one that is not logged is not checked."""

    run: Run
    expected: Mapping[str, Expected]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: D102
        if state.global_step != 1 or "loss" not in (logs or {}):
            return
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        checked = {key: expected for key, expected in self.expected.items() if key in numbers}
        text = ", ".join(f"{key} {numbers[key]:.6g} ({expected.value:.6g})" for key, expected in checked.items())
        if not all(expected.is_met_by(numbers[key], numbers) for key, expected in checked.items()):
            raise IntegrityError(
                f"step 1, found (expected): {text}; the reference is not what the policy starts as, and training "
                "would be held to another model; report this, or check what trainer: changes"
            )
        self.run.print_line(f"step 1 as expected, policy equals reference: {text}")
