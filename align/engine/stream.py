"""Events from the engine's thread to one reader, blocking or asyncio, and cancellation the other way."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Iterator

from align.engine.protocol import Event, RowDone, RowFailure
from align.errors import IntegrityError


class Stream:
    """The events of one request: the engine puts them, one reader takes them until every row has ended."""

    def __init__(self, rows: int, on_cancel: Callable[[], None] | None = None) -> None:
        self._on_cancel = on_cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._rows = self._open = rows
        self._cancelled: set[int] = set()
        self._wake: Callable[[], object] | None = None

    def put(self, event: Event) -> None:
        """Send an event to the reader; called from the engine's thread."""
        self._events.put(event)
        if (wake := self._wake) is not None:
            try:
                wake()
            except RuntimeError:  # the reader's event loop was closed
                self._wake = None
                self.cancel()

    def cancel(self, row: int | None = None) -> None:
        """Stop one row, or all; a stopped row ends with `RowDone(reason="cancelled")`."""
        self._cancelled.update(range(self._rows) if row is None else [row])
        if self._on_cancel is not None and self._open:
            self._on_cancel()

    def is_cancelled(self, row: int) -> bool:
        """Return whether this row was asked to stop."""
        return row in self._cancelled

    def __iter__(self) -> Iterator[Event]:
        """Yield events as they come; blocks between them."""
        while self._open:
            yield self._take(self._events.get())

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield events for asyncio; closing early cancels the rows still running."""
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        try:
            while self._open:
                # Cleared before the check: an event put after the check sets it again.
                ready.clear()
                try:
                    event = self._events.get_nowait()
                except queue.Empty:
                    await ready.wait()
                    continue
                yield self._take(event)
        finally:
            self._wake = None
            self.cancel()

    def _take(self, event: Event) -> Event:
        if isinstance(event, RowDone | RowFailure):
            self._open -= 1
        return event


def collect_texts(stream: Stream, rows: int) -> list[str]:
    """Wait for every row and return the texts in order; raises IntegrityError for the first row that failed."""
    texts = [""] * rows
    failures = []
    for event in stream:
        if isinstance(event, RowDone):
            texts[event.row] = event.text
        elif isinstance(event, RowFailure):
            failures.append(event.message)
    if failures:
        raise IntegrityError(failures[0])
    return texts
