"""Early stopping: how long a run goes on without a lower eval_loss, and which step was the best."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass
class Patience:
    """Counts evaluations in a row that brought no lower `eval_loss` than the best; `limit` None never runs out.

    As transformers' EarlyStoppingCallback counts with a threshold of zero: an equal loss is no better.
    """

    limit: int | None = None
    best: float | None = None
    """the lowest eval_loss so far"""
    step: int = 0
    """the step that it belongs to"""
    misses: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    """what was logged last when the best step was evaluated"""

    @classmethod
    def restored(cls, limit: int | None, saved: dict[str, Any]) -> Self:
        """As it was when `saved` was taken, under the limit asked for now."""
        return cls(**saved | {"limit": limit})

    @property
    def spent(self) -> bool:
        """Whether training should end."""
        return self.limit is not None and self.misses >= self.limit

    def see(self, step: int, loss: float, numbers: dict[str, float]) -> bool:
        """Take in an evaluation; True when it is the best so far."""
        if self.best is not None and loss >= self.best:
            self.misses += 1
            return False
        self.best, self.step, self.misses, self.numbers = loss, step, 0, dict(numbers)
        return True

    def saved(self) -> dict[str, Any]:
        """What `restored` takes."""
        return asdict(self)
