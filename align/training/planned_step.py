"""A training step before it is made: the rows and tokens of its passes, and its memory, under any settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from align.config import StageConfig
from align.registry import Checkpoint, Registry
from align.training.stage import Stage

if TYPE_CHECKING:
    import numpy

    from align.data.token_cache import TokenisedDataset
    from align.models.memory import LossHead, TrainingPass


@dataclass(frozen=True)
class PlannedStep:
    """A step of a stage on rows whose tokens are counted."""

    stage: Stage
    config: StageConfig
    registry: Registry
    parent: Checkpoint | None
    """the start; None for a new model"""
    tokens: TokenisedDataset
    _sizes: dict[str, dict[str, int]] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> numpy.ndarray:
        """The tokens of every sequence: (rows, sequences in a row)."""
        return self.tokens.lengths()

    @property
    def base(self) -> Checkpoint:
        """The base under the start."""
        assert self.parent is not None
        return self.registry.resolve_base(self.parent) if self.parent.is_adapter else self.parent

    def training_pass(self, config: StageConfig) -> TrainingPass:
        """Return the largest forward and backward pass under some settings."""
        from align.models.memory import TrainingPass

        sampled = config.row_length - config.token_length  # the longest completion that training samples after a row
        lengths = self.lengths + sampled
        longest = config.row_length if packs(config) else int(lengths.max())
        fast = self.stage.head == "fused" and getattr(config, "fast_path", False)
        head: LossHead = "packed" if fast else self.stage.head
        rows = config.per_device_train_batch_size * self.lengths.shape[1]
        if head == "packed":
            filled = fullest_share(config, lengths) * (1 - self.tokens.shared_share())
        else:
            filled = 1 - padding_share(config, self.lengths)
        return TrainingPass(rows, longest, head, filled)

    def memory(self, config: StageConfig) -> dict[str, int]:
        """Return the bytes at the peak of a step under some settings, by part, and their `total`."""
        from align.models.memory import estimate_memory

        assert self.parent is not None
        if (key := repr(config)) not in self._sizes:
            self._sizes[key] = estimate_memory(self.parent, self.base, config, self.training_pass(config))
        return self._sizes[key]


def packs(config: StageConfig) -> bool:
    """Return whether rows are joined into rows of max_length tokens."""
    return bool(getattr(config, "packing", False))


def padding_share(config: StageConfig, lengths: Any) -> float:
    """Return the share of padding in batches of shuffled rows, each padded to its longest row."""
    if packs(config):
        return 0.0
    padded = sum(int(batch.max()) * batch.size for batch in _shuffled_batches(config, lengths))
    return 1 - float(lengths.sum()) / padded


def fullest_share(config: StageConfig, lengths: Any) -> float:
    """Return the share of tokens in the fullest batch of shuffled rows, were all rows of it as long as the longest."""
    if packs(config):
        return 1.0
    fullest = max(int(batch.sum()) for batch in _shuffled_batches(config, lengths))
    return fullest / (config.per_device_train_batch_size * lengths.shape[1] * int(lengths.max()))


def _shuffled_batches(config: StageConfig, lengths: Any) -> list[Any]:
    import numpy

    shuffled = numpy.random.default_rng(config.seed).permutation(lengths)
    size = config.per_device_train_batch_size
    return numpy.split(shuffled, range(size, len(shuffled), size))


def count_steps(config: StageConfig, rows: int) -> int:
    """Return the optimiser steps of a run on so many rows."""
    steps = math.ceil(math.ceil(rows / config.rows_per_step) * config.num_train_epochs)
    return steps if config.max_steps < 0 else config.max_steps
