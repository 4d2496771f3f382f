"""An engine that is loaded on first use: a review whose answers are all written needs none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from align.engine.protocol import Engine, GenerationRequest, Row, RowFailure, Sampling, ShiftedToken
from align.engine.stream import Stream
from align.schema import Messages


class LazyEngine:
    """An engine with these models that calls `load` once, on first use; after a failure the next use tries again."""

    def __init__(self, models: list[str], load: Callable[[], Engine]) -> None:
        self.models = models
        self._load = load
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    @property
    def waiting(self) -> int:
        """Number of rows that are queued and not yet running."""
        return self._engine.waiting if self._engine else 0

    def loaded(self) -> Engine:
        """Return the loaded engine; blocks while it is being loaded."""
        with self._lock:
            if self._engine is None:
                self._engine = self._load()
            return self._engine

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request; before the engine is loaded it waits in a thread of its own."""
        if self._engine is not None:
            return self._engine.submit(request)
        rows = range(len(request.rows))
        handles: list[Stream] = []

        def cancel() -> None:
            for handle in handles:
                for row in filter(stream.is_cancelled, rows):
                    handle.cancel(row)

        def forward_events() -> None:
            try:
                handles.append(self.loaded().submit(request))
            except Exception as error:  # the reader must not wait for an engine that never comes
                for row in rows:
                    stream.put(RowFailure(row, f"the models could not be loaded: {error}"))
                return
            cancel()  # what was cancelled while the engine was loaded
            for event in handles[0]:
                stream.put(event)

        stream = Stream(len(request.rows), on_cancel=cancel)
        threading.Thread(target=forward_events, name="align-lazy-engine", daemon=True).start()
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """Return the texts of some rows."""
        return self.loaded().complete(rows, sampling)

    def token_shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Return the token shift of the answer that ends a conversation."""
        return self.loaded().token_shift(model, messages)

    def reward_score(self, messages: Messages) -> float | None:
        """Return the reward model's score of a conversation; None without a reward model."""
        return self.loaded().reward_score(messages)

    def close(self) -> None:
        """Close the engine, if it was loaded."""
        if self._engine is not None:
            self._engine.close()
