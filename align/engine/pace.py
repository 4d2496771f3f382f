"""How fast rows end, for telling a client when to come back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.engine.running_rows import RunningRow

_REMEMBERED = 32


class RowDurations:
    """The mean time of the last rows that ended."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque([1.0], maxlen=_REMEMBERED)

    def note(self, ended: Sequence[RunningRow]) -> None:
        """Remember how long some rows took, now that they have ended."""
        now = time.perf_counter()
        self._seconds.extend(now - row.started for row in ended)

    def seconds_until_free(self, waiting: int, at_once: int) -> float:
        """About how long until as many rows as wait have been written, so many at once: one second to a minute."""
        mean = sum(self._seconds) / len(self._seconds)
        return min(max(mean * waiting / at_once, 1.0), 60.0)
