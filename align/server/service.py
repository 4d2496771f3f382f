"""A request on the engine: queued, measured, and cancelled when its client goes away or its time is over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from align.engine.constraint import UNCOMPILED
from align.engine.protocol import (
    Engine,
    EngineBusy,
    Event,
    GenerationRequest,
    Row,
    RowDelta,
    RowDone,
    RowFailure,
    RowPrompt,
)
from align.engine.stream import Stream
from align.server.api_errors import ApiError, draining, internal_error, not_ready
from align.server.limits import ServerLimits
from align.server.served_models import ServedModel, ServedModels

LOG = logging.getLogger("align.server")

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ENGINE_FIELDS = ("stop_token_ids", "allowed_token_ids", "logit_bias", "chat_template_kwargs")
"""fields that only the engine can check"""

_CODES = {"too_long": "context_length_exceeded", "prompt": "invalid_prompt"}


class Metrics:
    """The metrics of one server; model names are those served, so that no client can create a series."""

    def __init__(self, waiting_rows: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        count, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        times = partial(Histogram, labelnames=["model"], registry=self._registry)
        by_model = ["model"]
        self.requests = count("align_requests", "Requests that ended.", ["path", "model", "status"])
        self.prompt_tokens = count("align_prompt_tokens", "Tokens read.", by_model)
        self.completion_tokens = count("align_completion_tokens", "Tokens written.", by_model)
        self.first_token = times(
            "align_time_to_first_token_seconds", "From a request to its first token.", buckets=_FIRST_TOKEN_S
        )
        self.between_tokens = times(
            "align_inter_token_seconds", "From a piece of text to the next.", buckets=_BETWEEN_S
        )
        self.seconds = times("align_request_seconds", "From a request to its end.", buckets=_WHOLE_S)
        self.running = gauge("align_requests_running", "Rows that are being written.", by_model)
        self.waiting = gauge("align_requests_waiting", "Rows without a first token yet.", by_model)
        gauge("align_queue_depth", "Rows that wait for the engine.").set_function(lambda: float(waiting_rows()))

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


@dataclass
class Service:
    """The state that all requests share; `engine` is None until the models are loaded."""

    engine: Engine | None
    models: ServedModels
    limits: ServerLimits
    running: int = 0
    """requests to the API that have not ended"""
    draining: bool = False
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: self.engine.waiting if self.engine is not None else 0)

    @property
    def ready(self) -> bool:
        """Return whether a request would be taken."""
        return self.engine is not None and not self.draining

    def submit(self, rows: tuple[Row, ...]) -> Stream:
        """Submit rows to the engine; raises ApiError when it is loading, shutting down or full."""
        if self.draining:
            raise draining()
        if self.engine is None:
            raise not_ready()
        try:
            return self.engine.submit(GenerationRequest(rows))
        except EngineBusy as full:
            raise ApiError(429, str(full), code="queue_full", retry_after=full.retry_after) from None

    async def answer(self, served: ServedModel, rows: tuple[Row, ...], receive: Receive) -> AsyncGenerator[Event, None]:
        """Yield the events of some rows; raises ApiError when a row fails or the time is over.

        However this ends, no row keeps running: a client that goes away frees its rows within one step.
        """
        deadline = asyncio.get_running_loop().time() + self.limits.max_seconds
        # `submit` compiles a grammar, which may take a second.
        compiles = any(row.rules.constraint is not None for row in rows)
        stream = await asyncio.to_thread(self.submit, rows) if compiles else self.submit(rows)

        async def cancel_when_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            stream.cancel()

        watch = asyncio.create_task(cancel_when_gone())
        meter = RequestMeter(self.metrics, served.name, len(rows))
        try:
            async with aclosing(stream.events()) as events:
                while (event := await self._next(events, deadline)) is not None:
                    meter.record(event)
                    if isinstance(event, RowFailure):
                        raise self._failed(event, rows[event.row])
                    yield event
        finally:
            watch.cancel()
            stream.cancel()
            meter.end()

    async def _next(self, events: AsyncIterator[Event], deadline: float) -> Event | None:
        try:
            async with asyncio.timeout_at(deadline):
                return await anext(events, None)
        except TimeoutError:
            message = f"no end within {self.limits.max_seconds:g} s; ask for fewer tokens, or when less is going on"
            raise ApiError(504, message, code="timeout") from None

    def _failed(self, error: RowFailure, row: Row) -> ApiError:
        """Return the error of a row that failed; internal errors are for the log only."""
        if error.fault not in _CODES:
            if self.draining:
                return draining()
            LOG.error("%s", error.message)
            return internal_error()
        # The reference may be a path, which clients must not see.
        message = error.message.removeprefix(f"{row.model}: ")
        param = "prompt" if row.is_raw_prompt else "messages"
        if message.startswith(UNCOMPILED):
            # The constraint of the request itself was checked before: this one was made of its tools.
            param, message = "tools", f"tools: {message}"
        param = next((name for name in _ENGINE_FIELDS if message.startswith(name)), param)
        if param == "chat_template_kwargs" and "'reasoning_effort'" in message:
            param = "reasoning_effort"
        return ApiError(400, message, param=param, code=_CODES[error.fault])


class RequestMeter:
    """Records the tokens and times of one request's rows."""

    def __init__(self, metrics: Metrics, model: str, rows: int) -> None:
        self._metrics, self._model = metrics, model
        self._started = time.perf_counter()
        self._latest: dict[int, float] = {}
        self._waiting, self._running = rows, 0
        metrics.waiting.labels(model).inc(rows)

    def record(self, event: Event) -> None:
        """Record one event; an echoed prompt is not part of the answer."""
        if isinstance(event, RowPrompt):
            return
        now, before = time.perf_counter(), self._latest.get(event.row)
        if before is None:
            self._move(waiting=-1, running=1)
        if isinstance(event, RowDelta):
            kind = self._metrics.first_token if before is None else self._metrics.between_tokens
            kind.labels(self._model).observe(now - (self._started if before is None else before))
        self._latest[event.row] = now
        if isinstance(event, RowDone):
            self._metrics.prompt_tokens.labels(self._model).inc(event.prompt_tokens)
            self._metrics.completion_tokens.labels(self._model).inc(event.completion_tokens)
        if isinstance(event, RowDone | RowFailure):
            self._move(running=-1)

    def end(self) -> None:
        """Remove the rows that are still counted as waiting or running."""
        self._move(waiting=-self._waiting, running=-self._running)
        self._metrics.seconds.labels(self._model).observe(time.perf_counter() - self._started)

    def _move(self, waiting: int = 0, running: int = 0) -> None:
        self._waiting += waiting
        self._running += running
        self._metrics.waiting.labels(self._model).inc(waiting)
        self._metrics.running.labels(self._model).inc(running)
