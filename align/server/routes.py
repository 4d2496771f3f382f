"""OpenAI's paths, and those for operators: /health, /ready, /metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from align.engine.protocol import Event, Row, RowDelta, RowDone, RowPrompt, Token
from align.server import replies
from align.server.api_errors import ApiError
from align.server.middleware import CLIENT_GONE, SCOPE_KEY, RequestRecord
from align.server.request_bodies import ChatBody, CompletionBody, GenerationBody
from align.server.served_models import ServedModel
from align.server.service import Service
from align.server.tools import use_tools

router = APIRouter()

_TIMEOUT_EVENT_S = 1.0
"""how long a client may take to read that its time is over"""

_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no", "content-type": "text/event-stream"}


@router.get("/health")
async def health() -> dict[str, str]:
    """Say that the process lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Say whether the models are loaded and requests are taken."""
    service = _service(request)
    status = "ready" if service.ready else "draining" if service.draining else "loading"
    return JSONResponse({"status": status}, 200 if service.ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return counts and times for Prometheus."""
    return PlainTextResponse(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List every id."""
    return {"object": "list", "data": _service(request).models.cards()}


# A hub id has a slash in it.
@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Return one model."""
    return _service(request).models.find(name).card(name)


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    return await _respond(request, body, replies.ChatReply())


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue texts."""
    return await _respond(request, body, replies.CompletionReply(body.echo, body.logprobs, body.prompt_logprobs))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _respond(request: Request, body: ChatBody | CompletionBody, format_: replies.ReplyFormat) -> Response:
    service = _service(request)
    body.check()
    served = service.models.find(body.model)
    rows = body.rows(served.reference, service.limits)
    if isinstance(body, ChatBody):
        rows, format_ = await asyncio.to_thread(use_tools, body, rows, service.engine)
    if body.constraint() is not None:
        await asyncio.to_thread(body.check_constraint)
    writer = ReplyWriter(format_, body, served, request.scope[SCOPE_KEY], rows)
    events = service.answer(served, rows, request.receive)
    if not body.stream:
        return await writer.whole(events)
    # An error before the first event is a plain response.
    return EventStream(writer.chunks(await anext(events), events), service.limits.max_seconds + _TIMEOUT_EVENT_S)


@dataclass
class ReplyWriter:
    """One request's events as a response."""

    format: replies.ReplyFormat
    body: GenerationBody
    served: ServedModel
    record: RequestRecord
    rows: tuple[Row, ...]
    created: int = field(default_factory=lambda: int(time.time()))
    done: list[RowDone] = field(default_factory=list)
    prompts: dict[int, RowPrompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wants_tokens = self.rows[0].logprobs is not None
        self.record.model, self.record.id = self.served.name, f"{self.format.prefix}-{secrets.token_hex(12)}"

    async def whole(self, events: AsyncGenerator[Event, None]) -> Response:
        """Return everything at once."""
        tokens: dict[int, list[Token]] = {row: [] for row in range(len(self.rows))}
        async with aclosing(events) as open_events:
            async for event in open_events:
                match event:
                    case RowDelta():
                        tokens[event.row] += event.tokens
                    case RowPrompt():
                        self.prompts[event.row] = event
                    case RowDone():
                        self._finish(event)
        self.done.sort(key=lambda done: done.row)
        choices = [
            self.format.whole(done, tokens[done.row] if self.wants_tokens else None, self.prompts.get(done.row))
            for done in self.done
        ]
        return JSONResponse(self._reply(choices, usage=self._usage()))

    async def chunks(self, first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """Yield the server-sent events of a stream whose first event has come."""
        async with aclosing(events) as open_events:
            if self.format.opening is not None:
                for row in range(len(self.rows)):
                    yield self._chunk(replies.choice_of(row, **self.format.opening))
            try:
                if choice := self._choice(first):
                    yield self._chunk(choice)
                async for event in open_events:
                    if choice := self._choice(event):
                        yield self._chunk(choice)
            except ApiError as error:
                self.record.status = error.status
                yield replies.server_event(error.body)
                return
        if self.body.include_usage:
            yield replies.server_event(self._reply([], self.format.chunk_suffix, usage=self._usage()))
        yield replies.DONE

    def _choice(self, event: Event) -> dict[str, Any] | None:
        """Return the choice of one event; None when it has none."""
        match event:
            case RowDelta() if event.text or event.tokens:
                prompt = self.prompts.get(event.row)
                tokens = event.tokens if self.wants_tokens else None
                return self.format.chunk(event.row, event.text, tokens, len(prompt.text) if prompt else 0)
            case RowPrompt():
                self.prompts[event.row] = event
                tokens = event.tokens if self.wants_tokens else None
                return self.format.chunk(event.row, event.text, tokens, 0) if self.format.echo else None
            case RowDone():
                self._finish(event)
                return self.format.ending(event.row, event.reason)
        return None

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self.body.include_usage else {}
        return replies.server_event(self._reply([choice], self.format.chunk_suffix, **usage))

    def _reply(self, choices: list[dict[str, Any]], suffix: str = "", **fields: Any) -> dict[str, Any]:
        return {
            "id": self.record.id, "object": self.format.kind + suffix, "created": self.created,
            "model": self.body.model, "system_fingerprint": self.served.digest, "choices": choices, **fields,
        }  # fmt: skip

    def _finish(self, done: RowDone) -> None:
        self.done.append(done)
        # A prompt counts once, however many answers it has.
        self.record.prompt_tokens += done.prompt_tokens if done.row % self.body.n == 0 else 0
        self.record.completion_tokens += done.completion_tokens
        if done.reason == "cancelled":
            self.record.status = CLIENT_GONE

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.record.prompt_tokens, self.record.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class EventStream(Response):
    """Server-sent events with a time limit.

    Starlette's StreamingResponse reads `receive` itself, which `Service` does to notice that the client is gone.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], seconds: float) -> None:
        super().__init__(headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        self._chunks = chunks
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send every chunk until the time is over, also for a client that does not read them."""
        async with aclosing(self._chunks) as chunks:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async for chunk in chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
