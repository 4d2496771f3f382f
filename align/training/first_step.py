"""A check of step 1: its numbers are known when the policy equals its reference."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import TrainerCallback

from align.errors import IntegrityError
from align.models.loading import Precision

if TYPE_CHECKING:
    from align.config import TrainerStageConfig
    from align.training.run import Run

LOGPS = ("logps/chosen", "logps/rejected")
"""the mean log-probabilities of completions that TRL logs; a batch without good or bad ones logs one of them"""


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


def expect_first(run: Run, trainer: Any, expected: Mapping[str, Expected]) -> None:
    """Let a trainer raise IntegrityError when step 1 logs other numbers; one that is not logged is not checked."""
    trainer.add_callback(_FirstStep(run, expected))


class _FirstStep(TrainerCallback):
    def __init__(self, run: Run, expected: Mapping[str, Expected]) -> None:
        self._run, self._expected = run, expected

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.global_step != 1 or "loss" not in (logs or {}):
            return
        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        checked = {key: expected for key, expected in self._expected.items() if key in numbers}
        text = ", ".join(f"{key} {numbers[key]:.6g} ({expected.value:.6g})" for key, expected in checked.items())
        if not all(expected.is_met_by(numbers[key], numbers) for key, expected in checked.items()):
            raise IntegrityError(
                f"step 1, found (expected): {text}; the reference is not what the policy starts as, and training "
                "would be held to another model; report this, or check what trainer: changes"
            )
        self._run.print_line(f"step 1 as expected, policy equals reference: {text}")
