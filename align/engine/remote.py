"""An engine on any server of the OpenAI API (vLLM, this project's own), one streamed request a row.

A thread of its own runs all requests on one event loop. It needs no torch.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from align.engine.protocol import (
    CLOSED,
    EngineBusy,
    FinishReason,
    GenerationRequest,
    Row,
    RowDelta,
    RowDone,
    RowFailure,
    Sampling,
    ShiftedToken,
)
from align.engine.stream import Stream, collect_texts
from align.engine.wire_format import error_text, fault_of, read_line, request_of, retry_seconds
from align.errors import MachineError, UsageError, nearest
from align.schema import Messages

_CONNECT_TIMEOUT_S = 10.0
_REASONS: dict[str | None, FinishReason] = {"length": "length", "cancelled": "cancelled"}


class RemoteEngine:
    """Generates text with the models of a server; `base_url` is like `http://127.0.0.1:8000/v1`.

    `timeout` is the longest silence of the server in seconds. A row that is refused with 429 is requested again for
    `patience` seconds, and meanwhile `submit` raises EngineBusy. At most `max_rows` are requested at once.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, models: Sequence[str] | None = None, *,
        timeout: float = 60.0, patience: float = 60.0, max_rows: int = 64,
    ) -> None:  # fmt: skip
        self._server = _Server(base_url, api_key, timeout, patience)
        self.models = self._server.models() if models is None else list(models)
        self._rows: set[_RemoteRow] = set()
        self._closing = threading.Event()
        self._slots = asyncio.Semaphore(max_rows)
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="align-remote", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of rows without a first token."""
        return sum(not row.first_token for row in tuple(self._rows))

    def submit(self, request: GenerationRequest) -> Stream:
        """Request every row; raises EngineBusy while the server takes no more."""
        seconds = self._server.busy_until - time.monotonic()
        if seconds > 0:
            raise EngineBusy(f"{self._server.url} is busy; try again in {seconds:.0f} seconds", seconds)
        rows: list[_RemoteRow] = []

        def stop_cancelled() -> None:
            for row in rows:
                row.stop_if_cancelled()

        stream = Stream(len(request.rows), on_cancel=lambda: self._on_loop(stop_cancelled))
        for index, row in enumerate(request.rows):
            if problem := self._problem(row):
                stream.put(RowFailure(index, problem))
            else:
                rows.append(_RemoteRow(self._server, stream, index, row, row.sampling or request.sampling))
        self._on_loop(lambda: self._start(rows))
        return stream

    def complete(self, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """Return the texts of some rows; raises IntegrityError if a row failed."""
        return collect_texts(self.submit(GenerationRequest(tuple(rows), sampling)), len(rows))

    def token_shift(self, model: str, messages: Messages) -> list[ShiftedToken]:
        """Raise UsageError: the API has no log-probabilities under the base."""
        about = "does not tell how its base would write; load the model on this machine"
        raise UsageError(f"{model}: {self._server.url} {about}")

    def reward_score(self, messages: Messages) -> float | None:
        """Return None: the API has no reward models."""
        return None

    def close(self) -> None:
        """Cancel what still runs and end the thread; those rows end with a RowFailure."""
        if not self._closing.is_set():
            self._closing.set()
            self._on_loop(self._ending.set)
            self._thread.join()

    def _problem(self, row: Row) -> str | None:
        """Return why a row cannot be requested; None when it can."""
        if self._closing.is_set():
            return CLOSED
        if row.model not in self.models:
            return f"{row.model}: not one of the models of {self._server.url};{nearest(row.model, self.models)}"
        if row.echo or row.prompt_logprobs is not None or row.prompt_only:
            return f"{row.model}: prompts are scored by models on this machine only; load it here"
        return None

    def _run(self) -> None:
        async def serve_until_closed() -> None:
            await self._ending.wait()
            tasks = [row.task for row in self._rows if row.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._server.client.aclose()

        # A runner also ends what httpx leaves behind of streams that are not read to their last byte.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(serve_until_closed())

    def _on_loop(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed, and every row has ended
            self._loop.call_soon_threadsafe(function)

    def _start(self, rows: list[_RemoteRow]) -> None:
        def end(row: _RemoteRow) -> None:
            # A task that is cancelled before its first step never runs: the last event is sent from here.
            self._rows.discard(row)
            row.end(CLOSED if self._closing.is_set() else None)

        for row in rows:
            self._rows.add(row)
            row.task = self._loop.create_task(row.run(self._slots))
            row.task.add_done_callback(lambda _, row=row: end(row))  # type: ignore[misc]
            row.stop_if_cancelled()


class _ErrorResponse(Exception):
    def __init__(self, response: httpx.Response) -> None:
        try:
            self.body: Any = response.json()
        except ValueError:
            self.body = response.text
        self.status = response.status_code
        seconds = retry_seconds(response.headers.get("retry-after"))
        self.retry_after = 1.0 if seconds is None else max(seconds, 0.1)
        super().__init__(f"{self.status}: {error_text(self.body)}")


class _StreamBroken(Exception):
    """The response did not come to its end; the text continues "the server ..."."""


class _Server:
    """The address (up to `/v1`, which is added to one without a path), the key and the connections."""

    def __init__(self, base_url: str, api_key: str | None, timeout: float, patience: float) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"{base_url}: not an address; give one like http://127.0.0.1:8000/v1")
        self.url = base_url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.patience = patience
        self.busy_until = 0.0  # on the monotonic clock
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT_S), pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self.client = httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits)

    def models(self) -> list[str]:
        """Return the models the server offers; raises MachineError where it does not answer with a list."""
        try:
            response = httpx.get(f"{self.url}/models", headers=self._headers, timeout=self._timeout)
            if response.is_error:
                raise _ErrorResponse(response)
            return [entry["id"] for entry in response.json()["data"]]
        except (httpx.HTTPError, _ErrorResponse) as error:
            raise MachineError(self.explain(error)) from None
        except (ValueError, KeyError, TypeError):
            about = "the answer is no list of models; give the address of an OpenAI API, up to /v1"
            raise MachineError(f"{self.url}/models: {about}") from None

    @asynccontextmanager
    async def post(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """Post a request and yield the lines of the response; raises _ErrorResponse for an error."""
        async with self.client.stream("POST", f"{self.url}{path}", json=body) as response:
            if response.is_error:
                await response.aread()
                raise _ErrorResponse(response)
            yield response.aiter_lines()

    def explain(self, error: Exception) -> str:
        match error:
            case _ErrorResponse(status=401 | 403):
                return f"{self.url} refused the key ({error}); give the server's own as api_key"
            case _ErrorResponse(status=404):
                return f"{self.url} knows no such thing ({error}); give its address up to /v1, and one of its models"
            case _ErrorResponse(status=429):
                return f"{self.url} is busy ({error}); ask again later"
            case _ErrorResponse():
                return f"{self.url} answered {error}"
            case _StreamBroken():
                return f"{self.url} {error}; try again"
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return f"{self.url} cannot be reached ({error}); start the server, or give another address"
            case httpx.TimeoutException():
                return f"{self.url} said nothing for {self._timeout.read:.0f} seconds; try again, or allow it more"
            case _:
                what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                return f"{self.url} broke off or answered in another language ({what}); try again"


class _RemoteRow:
    """One row, from the request to its last event."""

    def __init__(self, server: _Server, stream: Stream, index: int, row: Row, sampling: Sampling) -> None:
        self.task: asyncio.Task[None] | None = None
        self.first_token = 0.0
        self._server, self._stream, self._index, self._row, self._sampling = server, stream, index, row, sampling
        self._started = time.perf_counter()
        self._text, self._chunks = "", 0
        self._reason: str | None = None
        self._usage: dict[str, int] = {}
        self._last: RowDone | RowFailure | None = None

    def stop_if_cancelled(self) -> None:
        if self.task is not None and self._stream.is_cancelled(self._index):
            self.task.cancel()

    async def run(self, slots: asyncio.Semaphore) -> None:
        """Request the row and send its events, except the last."""
        try:
            async with slots:
                await self._request_patiently()
            self._last = self._done(self._reason)
        except (httpx.HTTPError, _ErrorResponse, _StreamBroken, ValueError, KeyError, TypeError) as error:
            fault = fault_of(error.status, error.body) if isinstance(error, _ErrorResponse) else "engine"
            self._last = RowFailure(self._index, f"{self._row.model}: {self._server.explain(error)}", fault)

    def end(self, closed: str | None) -> None:
        """Send the last event; a row that was interrupted is cancelled, or failed when the engine was closed."""
        interrupted = RowFailure(self._index, closed) if closed else self._done("cancelled")
        self._stream.put(self._last or interrupted)

    async def _request_patiently(self) -> None:
        """Send the request, and again while the server answers that it is busy."""
        give_up = time.monotonic() + self._server.patience
        while True:
            try:
                await self._request()
                return
            except _ErrorResponse as error:
                if error.status != 429 or time.monotonic() + error.retry_after > give_up:
                    raise
                self._server.busy_until = time.monotonic() + error.retry_after
                await asyncio.sleep(error.retry_after)

    async def _request(self) -> None:
        async with self._server.post(*request_of(self._row, self._sampling)) as lines:
            async for line in lines:
                event = read_line(line)
                if event.last:
                    break
                if event.error is not None:
                    raise _StreamBroken(f"ended the answer with an error ({event.error})")
                self._reason = event.reason or self._reason
                self._usage = event.usage or self._usage
                if event.text or event.tokens:
                    self.first_token = self.first_token or time.perf_counter()
                    self._text += event.text
                    self._chunks += 1
                    # The API adds the token itself where it is none of the alternatives.
                    most = self._row.logprobs or 0
                    tokens = tuple(replace(token, top=token.top[:most]) for token in event.tokens)
                    self._stream.put(RowDelta(self._index, event.text, tokens))
        if self._reason is None:
            raise _StreamBroken("broke off before the answer ended")

    def _done(self, reason: str | None) -> RowDone:
        return RowDone(
            self._index, self._text, _REASONS.get(reason, "stop"),
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            completion_tokens=self._usage.get("completion_tokens", self._chunks),
            first_token_seconds=self.first_token - self._started if self.first_token else 0.0,
            seconds=time.perf_counter() - self._started,
        )  # fmt: skip
