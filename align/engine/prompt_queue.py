"""Rendering and encoding of prompts in a separate process, so that a costly conversation delays no stream.

The process is killed when a prompt takes too long or nobody waits for it any more; see `align.data.bounded_process`.
"""

from __future__ import annotations

import pickle
import threading
import time
from array import array
from bisect import insort
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from align.data.bounded_process import BoundedProcess, ProcessEnded, without_torch
from align.data.rendering import template_process
from align.engine.protocol import Row
from align.engine.running_rows import RowState, encode_or_message

TIMEOUT_S = 10
"""the longest CPU time of one prompt"""

_MEMORY_BYTES = 2 << 30
_LARGE_CHARACTERS = 1 << 14
"""a prompt at least this long waits for all that are shorter"""

_START_S = 2.0
"""how long an abandoned prompt may go on: starting another process takes as long"""

_OK, _FAILED = b"+", b"-"


class PromptQueue:
    """Rows whose prompts are to be encoded, short ones first; `ready` is called with each encoded row.

    A row that cannot be encoded ends with an error here. `window` is the model's context length in tokens.
    """

    def __init__(self, tokenizer: Any, window: int | None, ready: Callable[[RowState], None]) -> None:
        self._window, self._ready = window, ready
        self._process = BoundedProcess(
            "align.engine.prompt_queue:answer_request", TIMEOUT_S, _MEMORY_BYTES, setup=pickle.dumps(tokenizer)
        )
        self._rows: list[RowState] = []
        self._current: RowState | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="align-prompts", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._rows) + (self._current is not None)

    def extend(self, rows: Iterable[RowState]) -> None:
        """Queue rows."""
        with self._changed:
            for state in rows:
                insort(self._rows, state, key=lambda one: prompt_characters(one.row) > _LARGE_CHARACTERS)
            self._changed.notify_all()

    def take_cancelled(self) -> list[RowState]:
        """Remove the rows that were cancelled, and return them."""
        with self._changed:
            cancelled: list[RowState] = []
            rows, self._rows = self._rows, []
            for state in rows:
                (cancelled if state.cancelled else self._rows).append(state)
            if self._current is not None and self._current.cancelled:
                cancelled.append(self._current)
                self._current = None
        return cancelled

    def close(self) -> list[RowState]:
        """End the process and return the rows that were not encoded."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._process.close()
        left = self._rows + ([self._current] if self._current else [])
        self._rows, self._current = [], None
        return left

    def _work(self) -> None:
        with suppress(ProcessEnded):  # then the first prompt fails with the reason
            self._process.ask(pickle.dumps(None), lambda: self._closing)  # so that the process has started
        while (state := self._next()) is not None:
            reply = self._ask(state)
            with self._changed:
                if self._current is not state or (reply is None and self._closing):
                    continue  # cancelled, or left for `close` to return
                self._current = None
            if reply is None:
                state.cancel()
            elif reply[:1] == _FAILED:
                state.fail(reply[1:].decode("utf-8", "surrogatepass"), "prompt")
            elif state.take_prompt(array("I", reply[1:]).tolist(), self._window):
                self._ready(state)

    def _next(self) -> RowState | None:
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._closing)
            if self._closing:
                return None
            self._current = self._rows.pop(0)
            return self._current

    def _ask(self, state: RowState) -> bytes | None:
        """Return the reply of the process; None when the row was cancelled or the engine is closing."""
        started = time.monotonic()

        def unwanted() -> bool:
            return self._closing or (state.cancelled and time.monotonic() - started > _START_S)

        try:
            return self._process.ask(pickle.dumps(state.row), unwanted)
        except ProcessEnded as error:
            if unwanted():
                return None
            return _FAILED + f"{state.row.model}: encoding this prompt {error}; shorten it".encode()


def prompt_characters(row: Row) -> int:
    """Return about how long a prompt is, in characters."""
    return len(row.text or row.ids or "") + sum(len(str(message.get("content"))) for message in row.messages)


_STATE: dict[str, Any] = {}


def answer_request(request: bytes) -> bytes:
    """Return the reply to one request, the first of which is the tokenizer; runs in the child process."""
    without_torch()
    template_process.inside = True
    if not _STATE:
        _STATE["tokenizer"] = pickle.loads(request)
        return _OK
    if (row := pickle.loads(request)) is None:
        return _OK
    try:
        ids = encode_or_message(row, _STATE["tokenizer"])
    except MemoryError:
        ids = f"{row.model}: encoding this prompt took more than {_MEMORY_BYTES >> 30} GiB; shorten it"
    if isinstance(ids, str):
        return _FAILED + ids.encode("utf-8", "surrogatepass")
    return _OK + array("I", ids).tobytes()
