"""The time of a training step on this machine, from trials of it at two depths: what a layer adds is the same.

Rows of mean length stand for all. Where a step of the run would take long, fewer rows do, and their time is scaled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from statistics import mean
from typing import TYPE_CHECKING, Any

from align.config import StageConfig
from align.errors import UsageError
from align.training.planned_step import PlannedStep, packs
from align.training.trial import StepClock, TrialRows, time_trial

if TYPE_CHECKING:
    import torch

    from align.data import RecordSet

_SHALLOW, _DEEP = 1, 5
"""layers of the two trials; a model of no more layers than the second is tried as it is"""
_STEP_S = 0.8
"""seconds that a step of the deeper trial may take by the speed of matrix products; rows are left out above it"""
_ROW_S = 10.0
"""the same for a single row, above which there is no trial"""
_TRAINED, _SAMPLED = 4, 14
"""operations a weight and token in training an adapter: forward and backward; with sampling and scoring before"""
_UNCACHED = 256 << 20
"""bytes of weights that are read from memory at every token"""
_COPIES = 10
"""bytes a weight of a trial, while it is written and read again"""
_REFERENCE = 1 / 3
"""a pass of the reference over some rows, in steps on them"""

Pick = Callable[[Sequence[float]], float]
Phases = dict[str, float]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: the estimate, and the lowest and highest that the trials allow."""

    seconds: float
    low: float
    high: float
    steps: int
    before: float = 0.0
    """seconds of the reference's pass over the data, before the first step"""
    new_tokens_per_second: float | None = None
    """of sampled completions, all of them of full length"""

    @property
    def total(self) -> float:
        """The seconds of all steps and of what is before them."""
        return self.steps * self.seconds + self.before


@dataclass
class StepTimer:
    """Times a planned step of a run of so many steps by trials on some of its `rows`, tokenised from `records`."""

    step: PlannedStep
    records: RecordSet
    rows: Any
    steps: int
    parameters: int
    """of the whole model"""
    free: int
    """bytes that a trial may take"""
    _clocks: dict[tuple[int, str], StepClock] = field(default_factory=dict)

    def estimate(self) -> StepTime:
        """Return the time of a step under the settings of the run; UsageError when no trial can be afforded."""
        config = self.step.config
        seconds, low, high = (self._step_seconds(config, pick) for pick in (mean, min, max))
        tokens = None
        if self._sampled(config):
            rollout = self._rollout_seconds(config, self._phases(config, mean)["rollout"])
            tokens = self._sampled_rows(config) * (config.row_length - config.token_length) / rollout
        before = 0.0
        if getattr(config, "cache_reference", False):
            before = _REFERENCE * seconds * len(self.rows) / config.rows_per_step
        return StepTime(seconds, min(low, seconds), max(high, seconds), self.steps, before, tokens)

    def ratio(self, changed: StageConfig) -> float:
        """Return the time of a step under other settings over that as they are, at the depth of the deeper trial."""
        deep = min(_DEEP, self._layers)
        ours, theirs = (
            self._whole_step(config, _phases(self._trial(config, deep), mean, self._sampled(config)))
            for config in (self.step.config, changed)
        )
        return theirs / ours

    @cached_property
    def _layers(self) -> int:
        from align.models.shallow import count_layers

        return count_layers(self.step.base) if self.step.parent is not None else 1

    def _sampled(self, config: StageConfig) -> int:
        """Return the tokens of the rollout of a step of the trial, all of full length; 0 without one."""
        return self._sampled_rows(self._trial_settings(config)) * (config.row_length - config.token_length)

    def _trial_settings(self, config: StageConfig) -> StageConfig:
        return config.for_trial(self._rows_of_trial(config))

    def _sampled_rows(self, config: StageConfig) -> int:
        """Return the completions of the rollout of a step."""
        completions = config.rows_per_step * getattr(config, "num_generations", 1)
        return getattr(config, "rollout_batch_size", completions)

    def _growth(self, few: int, many: int) -> float:
        """Return the time of a product of many rows with the model's weights over that of few, measured."""
        return decoding_seconds(self._width, many, self._dtype) / decoding_seconds(self._width, few, self._dtype)

    def _step_seconds(self, config: StageConfig, pick: Pick) -> float:
        return self._whole_step(config, self._phases(config, pick))

    def _phases(self, config: StageConfig, pick: Pick) -> Phases:
        """Return the seconds of each phase of a step of the trial, in the whole model."""
        depths = [self._layers] if self._layers <= _DEEP else [_SHALLOW, _DEEP]
        spans = [_phases(self._trial(config, depth), pick, self._sampled(config)) for depth in depths]
        if len(spans) == 1:
            return spans[0]
        more = (self._layers - depths[0]) / (depths[1] - depths[0])
        # A layer that seems to take no time is noise.
        return {key: first + more * max(spans[1][key] - first, 0.0) for key, first in spans[0].items()}

    def _whole_step(self, config: StageConfig, phases: Phases) -> float:
        """Return the seconds of a whole step of the run from those of the phases of a step of its trial."""
        small = self._trial_settings(config)
        epochs = {"update": getattr(config, "num_ppo_epochs", getattr(config, "num_iterations", 1))}
        scale = config.rows_per_step / small.rows_per_step
        work = self.step.training_pass(config)
        if work.head in ("fused", "full"):
            scale /= work.filled  # rows of one length are not padded
        trained = {phase: seconds for phase, seconds in phases.items() if phase != "rollout"}
        passes = scale * sum(seconds * epochs.get(phase, 1) for phase, seconds in trained.items())
        return passes + self._rollout_seconds(config, phases.get("rollout", 0.0))

    def _rollout_seconds(self, config: StageConfig, seconds: float) -> float:
        """Return the seconds of the run's rollout from those of the trial's: prompts are read row by row, and the rows
        of a step decode together.
        """
        if not seconds:
            return 0.0
        few, many = (self._sampled_rows(each) for each in (self._trial_settings(config), config))
        prompts = few * self.step.lengths.sum(axis=1).mean()
        reading = min(seconds, 2 * self._head_and_layers[1] * prompts / self._speed)
        return reading * many / few + (seconds - reading) * min(many / few, self._growth(few, many))

    def _trial(self, config: StageConfig, depth: int) -> StepClock:
        small = self._trial_settings(config)
        if (key := (depth, repr(small))) not in self._clocks:
            rows = TrialRows(self.records, self.rows.select(self._average_rows(small)))
            with self._explained(depth):
                self._clocks[key] = time_trial(self.step.stage, small, rows, self._models(small, depth))
        return self._clocks[key]

    @contextmanager
    def _explained(self, depth: int) -> Iterator[None]:
        """Raise UsageError where a trial is too large for this machine, fails, or would leave it."""
        if getattr(self.step.config, "vllm", None) is not None:
            raise UsageError("with vllm a step is not only of this process")
        needed = _COPIES * self._weights
        if self.step.parent is not None:
            sizes = self.step.memory(self.step.config)
            needed += sizes["logits"] + sizes["activations"] * depth / self._layers
        if needed > self.free:
            raise UsageError(
                f"steps on {depth} layers need about {needed / 2**30:.1f} GiB, and {self.free / 2**30:.1f} GiB are free"
            )
        try:
            yield
        except Exception as error:  # a plan that cannot be timed is still a plan
            first = str(error).partition("\n")[0]
            raise UsageError(f"steps on {depth} layers could not be made ({type(error).__name__}: {first})") from error

    def _models(self, config: StageConfig, depth: int) -> dict[str, Callable[..., None]]:
        """Return the functions that write the shallow models of a trial, by the setting that names each."""
        from align.models.shallow import write_shallow_adapter, write_shallow_base

        if self.step.parent is None:
            return {}
        writers: dict[str, Callable[..., None]] = {"base": partial(write_shallow_base, self.step.base, depth)}
        for setting, reference in config.references.items():
            checkpoint = self.step.registry.resolve(reference)
            if checkpoint.is_adapter:
                writers[setting] = partial(write_shallow_adapter, checkpoint, depth)
        return writers

    def _average_rows(self, config: StageConfig) -> list[int]:
        """Return the rows whose tokens are nearest to the mean, as many as the steps of a trial take."""
        import numpy

        tokens = self.step.lengths.sum(axis=1)
        wanted = config.rows_per_step * config.max_steps
        if packs(config):
            wanted *= max(1, round(config.max_length / tokens.mean()))
        order = numpy.argsort(numpy.abs(tokens - tokens.mean()), kind="stable")
        return [int(row) for row in numpy.sort(order[:wanted])]

    def _rows_of_trial(self, config: StageConfig) -> int:
        """Return the rows of a pass of a trial: those of the run, or as many as can be afforded."""
        sampled = config.row_length - config.token_length
        tokens = config.max_length if packs(config) else self.step.lengths.sum(axis=1).mean() + sampled
        work = (_SAMPLED if sampled else _TRAINED) * self._weights * tokens
        row = work / self._speed
        if row > _ROW_S:
            raise UsageError(f"one row on {_DEEP} layers takes about {row:.0f} s by the speed of matrix products")
        return max(1, min(config.per_device_train_batch_size, int(_STEP_S / row)))

    @cached_property
    def _weights(self) -> float:
        """The weights of the deeper trial that a token is multiplied with: layers and head."""
        if self.step.parent is None:
            return self.parameters
        head, layers = self._head_and_layers
        return head + layers * min(1, _DEEP / self._layers)

    @cached_property
    def _head_and_layers(self) -> tuple[int, int]:
        """The weights of the head, and of all layers."""
        from align.models.base_files import build_shapes

        model = build_shapes(self.step.base)
        embeddings = model.get_input_embeddings().weight.numel()
        everything = sum(parameter.numel() for parameter in model.parameters())
        head = model.get_output_embeddings().weight
        tied = head is model.get_input_embeddings().weight
        return head.numel(), everything - embeddings - (0 if tied else head.numel())

    @cached_property
    def _speed(self) -> float:
        """Operations a second in products of the model's width, in its arithmetic."""
        return 512 * 2 * 4 * self._width**2 / product_seconds(self._width, 512, self._dtype)

    @cached_property
    def _width(self) -> int:
        from align.models.base_files import load_text_config

        return load_text_config(self.step.base).hidden_size if self.step.parent is not None else 256

    @cached_property
    def _dtype(self) -> torch.dtype:
        import torch

        from align.models.loading import Precision

        return torch.bfloat16 if Precision.of(self.step.config).uses_bf16 else torch.float32


@cache
def decoding_seconds(width: int, rows: int, dtype: torch.dtype) -> float:
    """Return the measured seconds of products with more weights than a processor's cache holds."""
    return product_seconds(width, rows, dtype, count=max(1, _UNCACHED // (16 * width * width)))


def product_seconds(width: int, rows: int, dtype: torch.dtype, count: int = 1) -> float:
    """Return the seconds of products of so many rows with `count` matrices (4 width, width), the fastest of four."""
    import torch

    from align.models.loading import current_device

    x = torch.ones(rows, width, dtype=dtype, device=current_device())
    weights = torch.ones(count, 4 * width, width, dtype=dtype, device=current_device())
    fastest = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        products = [x @ matrix.T for matrix in weights]
        float(products[-1][0, 0])  # reading a number waits for the device
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest


def _phases(clock: StepClock, pick: Pick, sampled: int) -> Phases:
    """Return the seconds of a step by phase, the first step left out; a rollout samples so many tokens."""
    seconds = pick(clock.seconds[1:])
    prefix = "tokens_per_second/"
    speeds = {key.removeprefix(prefix): speed for key, speed in clock.numbers[-1].items() if key.startswith(prefix)}
    if not speeds:
        return {"step": seconds}
    shares = {phase: sampled / speed / seconds for phase, speed in speeds.items()}
    shares.setdefault("update", max(0.0, 1 - shares["rollout"]))
    return {phase: seconds * share / sum(shares.values()) for phase, share in shares.items()}
