"""An engine without a model: it says fixed words at a fixed pace. For tests of pages and servers only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from align.engine.protocol import GenerationRequest, Row, RowDelta, RowDone, RowError, Sampling
from align.engine.stream import Stream, collect


class FakeEngine:
    """Answers with what `reply` returns, a word at a time; a reply of None is a row that fails."""

    def __init__(self, models: list[str], reply: Callable[[Row], str | None], seconds_per_word: float = 0.0) -> None:
        self.models = models
        self._reply = reply
        self._pause = seconds_per_word

    def submit(self, request: GenerationRequest) -> Stream:
        """Start a thread that speaks all rows in turn, word by word."""
        stream = Stream(len(request.rows))
        threading.Thread(target=self._speak, args=(request, stream), daemon=True).start()
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """The replies to some rows."""
        return collect(self.submit(GenerationRequest(tuple(rows), sampling)), len(rows))

    def close(self) -> None:
        """Nothing to end."""

    def _speak(self, request: GenerationRequest, stream: Stream) -> None:
        words: dict[int, list[str]] = {}
        for index, row in enumerate(request.rows):
            reply = self._reply(row)
            if reply is None:
                stream.put(RowError(index, f"{row.model}: no reply; ask another model"))
            else:
                words[index] = [word + " " for word in reply.split(" ")][: request.sampling.max_new_tokens]
        started = time.perf_counter()
        said: dict[int, str] = dict.fromkeys(words, "")
        while said:
            time.sleep(self._pause)
            for index in list(said):
                if words[index] and not stream.is_cancelled(index):
                    said[index] += words[index][0]
                    stream.put(RowDelta(index, words[index].pop(0)))
                    continue
                reason = "cancelled" if stream.is_cancelled(index) else "stop"
                text = said.pop(index).rstrip()
                seconds = time.perf_counter() - started
                stream.put(RowDone(index, text, reason, 1, len(text.split()), self._pause, seconds))  # type: ignore[arg-type]
