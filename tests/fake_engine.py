"""An engine without a model: it says fixed words at a fixed pace. For tests of pages and servers only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from align.engine.protocol import (
    Alternative,
    EngineBusy,
    FinishReason,
    GenerationRequest,
    Row,
    RowDelta,
    RowDone,
    RowFailure,
    RowPrompt,
    Sampling,
    ShiftedToken,
    Token,
)
from align.engine.stream import Stream, collect_texts
from align.errors import UsageError
from align.schema import Messages

_LOGPROB = -0.5


@dataclass
class _FakeReply:
    """What one row has yet to say."""

    row: Row
    words: list[str]
    reason: FinishReason
    said: str = ""
    count: int = 0


class FakeEngine:
    """Answers with what `reply` returns, a word at a time; a reply of None is a row that fails.

    With `max_waiting_rows`, as many rows may be unfinished before `submit` raises EngineBusy. `score` gives `reward`.
    A row that has said some words says no more for as long as `holds`, given the row and their number, is true.
    """

    def __init__(
        self,
        models: list[str],
        reply: Callable[[Row], str | None],
        seconds_per_word: float = 0.0,
        *,
        max_waiting_rows: int | None = None,
        score: Callable[[Messages], float | None] | None = None,
        holds: Callable[[Row, int], bool] | None = None,
    ) -> None:
        self.models = models
        self._reply = reply
        self._pause = seconds_per_word
        self._most = max_waiting_rows
        self._score = score
        self._holds = holds
        self._closing = threading.Event()
        self._unfinished = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """How many rows have not ended."""
        return self._unfinished

    def submit(self, request: GenerationRequest) -> Stream:
        """Start a thread that speaks all rows in turn, word by word."""
        with self._lock:
            if self._most is not None and self._unfinished + len(request.rows) > self._most:
                raise EngineBusy(f"{self._unfinished} rows are waiting; try again in a second", retry_after=1.0)
            self._unfinished += len(request.rows)
        stream = Stream(len(request.rows))
        threading.Thread(target=self._speak, args=(request, stream), daemon=True).start()
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """The replies to some rows."""
        return collect_texts(self.submit(GenerationRequest(tuple(rows), sampling)), len(rows))

    def token_shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """The words of the answer, more likely under the model by a tenth of a nat a letter."""
        if model not in self.models:
            raise UsageError(f"{model}: not one of the models; name one of them")
        words = [*messages[-1]["content"].split(" "), "<end>"]
        return [
            ShiftedToken(word, _LOGPROB, _LOGPROB - len(word) / 10, ((word, _LOGPROB),), (("other", _LOGPROB),))
            for word in words
        ]

    def reward_score(self, messages: Messages) -> float | None:
        """What `score` says."""
        return None if self._score is None else self._score(messages)

    def close(self) -> None:
        """End what is being said with a RowFailure."""
        self._closing.set()

    def _speak(self, request: GenerationRequest, stream: Stream) -> None:
        replies: dict[int, _FakeReply] = {}
        for index, row in enumerate(request.rows):
            reply = self._reply(row)
            if reply is None:
                self._end(stream, RowFailure(index, f"{row.model}: no reply; ask another model"))
            else:
                replies[index] = _make_reply(row, reply, row.sampling or request.sampling)
                if row.echo:
                    stream.put(RowPrompt(index, row.text or ""))
        started = time.perf_counter()
        while replies:
            time.sleep(self._pause)
            for index, reply_state in list(replies.items()):
                cancelled = stream.is_cancelled(index)
                if reply_state.words and not cancelled and not self._closing.is_set():
                    if self._holds is None or not self._holds(reply_state.row, reply_state.count):
                        stream.put(_say(index, reply_state))
                    continue
                del replies[index]
                if reply_state.words and not cancelled:
                    self._end(stream, RowFailure(index, "the engine was closed; start it again"))
                    continue
                seconds = time.perf_counter() - started
                reason = "cancelled" if cancelled else reply_state.reason
                self._end(stream, RowDone(index, reply_state.said, reason, 1, reply_state.count, self._pause, seconds))

    def _end(self, stream: Stream, event: RowDone | RowFailure) -> None:
        with self._lock:
            self._unfinished -= 1
        stream.put(event)


def _make_reply(row: Row, reply: str, sampling: Sampling) -> _FakeReply:
    stops = [place for place in map(reply.find, sampling.stop) if place >= 0]
    words = reply[: min(stops)].split(" ") if stops else reply.split(" ")
    spoken = [] if row.prompt_only else words[: sampling.max_new_tokens]
    pieces = [word + " " for word in spoken[:-1]] + spoken[-1:]
    return _FakeReply(row, pieces, "length" if len(spoken) < len(words) else "stop")


def _say(index: int, reply_state: _FakeReply) -> RowDelta:
    word = reply_state.words.pop(0)
    reply_state.said += word
    reply_state.count += 1
    if reply_state.row.logprobs is None:
        return RowDelta(index, word)
    others = tuple(_alternative(f"other{place}", _LOGPROB - place) for place in range(1, reply_state.row.logprobs))
    top = (_alternative(word, _LOGPROB), *others)[: reply_state.row.logprobs]
    start = len(reply_state.said) - len(word)
    return RowDelta(index, word, (Token(reply_state.count, word, _LOGPROB, top, word.encode(), start),))


def _alternative(text: str, logprob: float) -> Alternative:
    return Alternative(text, logprob, text.encode())
