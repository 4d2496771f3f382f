"""OpenAI's paths, and those that operators ask: /health, /ready, /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from align.engine.protocol import Event, Row, RowDelta, RowDone, RowPrompt, Token
from align.server import replies
from align.server.api_errors import ApiError
from align.server.metrics import CONTENT_TYPE
from align.server.request_bodies import ChatBody, CompletionBody, GenerationBody
from align.server.request_log import CLIENT_GONE, RequestRecord, request_record
from align.server.service import Service
from align.server.tools import use_tools

router = APIRouter()

_TO_SAY_SO = 1.0
"""seconds in which a client may still read that its time is over"""

_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no", "content-type": "text/event-stream"}


@router.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """The models are loaded and requests are taken."""
    service = _service(request)
    status = "ready" if service.ready else "draining" if service.draining else "loading"
    return JSONResponse({"status": status}, 200 if service.ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    return PlainTextResponse(_service(request).metrics.text(), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Every id there is."""
    return {"object": "list", "data": _service(request).models.cards()}


# A hub id has a slash in it.
@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One model."""
    return _service(request).models.find(name).card(name)


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatBody) -> Response:
    """ReplyWriter a conversation."""
    return await _respond(request, body, replies.ChatReply())


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue texts."""
    return await _respond(request, body, replies.CompletionReply(body.echo, body.logprobs, body.prompt_logprobs))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _respond(request: Request, body: ChatBody | CompletionBody, style: replies.ReplyFormat) -> Response:
    service = _service(request)
    body.check()
    served = service.models.find(body.model)
    rows = body.rows(served.reference, service.limits)
    if isinstance(body, ChatBody):
        rows, style = await asyncio.to_thread(use_tools, body, rows, service.engine)
    if body.constraint() is not None:
        await asyncio.to_thread(body.check_constraint)
    head = replies.head_of(style, body.model, served)
    record = request_record(request.scope)
    record.model, record.id = served.name, head.id
    answer = ReplyWriter(style, head, body, record, rows)
    events = service.answer(served, rows, request.receive)
    if body.stream:
        return await answer.stream(events, service.limits.max_seconds)
    return await answer.whole(events)


class ReplyWriter:
    """One request's events as a response."""

    def __init__(
        self,
        style: replies.ReplyFormat,
        head: replies.ReplyHeader,
        body: GenerationBody,
        record: RequestRecord,
        rows: tuple[Row, ...],
    ) -> None:
        self._style = style
        self._head = head
        self._usage = body.include_usage
        self._note = record
        self._wants_tokens = rows[0].logprobs is not None
        self._answers = body.n
        self._done: list[RowDone] = []
        self._rows = len(rows)
        self._prompts: dict[int, RowPrompt] = {}

    async def whole(self, events: AsyncGenerator[Event, None]) -> Response:
        """Everything at once."""
        tokens: dict[int, list[Token]] = {}
        async with aclosing(events) as running:
            async for event in running:
                if isinstance(event, RowDelta):
                    tokens.setdefault(event.row, []).extend(event.tokens)
                elif isinstance(event, RowPrompt):
                    self._prompts[event.row] = event
                elif isinstance(event, RowDone):
                    self._finish(event)
        ended = sorted(self._done, key=lambda done: done.row)
        choices = [
            self._style.whole(
                done, tokens.get(done.row, []) if self._wants_tokens else None, self._prompts.get(done.row)
            )
            for done in ended
        ]
        return JSONResponse(self._head.reply(choices, usage=replies.usage(ended, self._answers)))

    async def stream(self, events: AsyncGenerator[Event, None], seconds: float) -> Response:
        """Piece by piece, for so long at most; what fails before the first piece is a plain refusal."""
        return EventStream(self._pieces(await anext(events), events), seconds + _TO_SAY_SO)

    async def _pieces(self, first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(events) as running:
            for row in range(self._rows):
                if opening := self._style.opening(row):
                    yield self._chunk([opening])
            try:
                for piece in self._of(first):
                    yield piece
                async for event in running:
                    for piece in self._of(event):
                        yield piece
            except ApiError as refusal:
                self._note.status = refusal.status
                yield replies.event(refusal.body)
                return
        if self._usage:
            yield replies.event(
                self._head.reply([], self._style.chunk_suffix, usage=replies.usage(self._done, self._answers))
            )
        yield replies.DONE

    def _of(self, event: Event) -> list[bytes]:
        """The pieces of one event."""
        if isinstance(event, RowDelta) and (event.text or event.tokens):
            tokens = event.tokens if self._wants_tokens else None
            prompt = self._prompts.get(event.row)
            before = len(prompt.text) if prompt else 0
            return [self._chunk([self._style.piece(event.row, event.text, tokens, before)])]
        if isinstance(event, RowPrompt):
            self._prompts[event.row] = event
            told = self._style.prompt(event, event.tokens if self._wants_tokens else None)
            return [] if told is None else [self._chunk([told])]
        if isinstance(event, RowDone):
            self._finish(event)
            return [self._chunk([self._style.ending(event.row, event.reason)])]
        return []

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        more = {"usage": None} if self._usage else {}
        return replies.event(self._head.reply(choices, self._style.chunk_suffix, **more))

    def _finish(self, done: RowDone) -> None:
        self._done.append(done)
        self._note.prompt_tokens += done.prompt_tokens if done.row % self._answers == 0 else 0
        self._note.completion_tokens += done.completion_tokens
        if done.reason == "cancelled":
            self._note.status = CLIENT_GONE


class EventStream(Response):
    """Server-sent events, sent as they are made and closed whatever happens."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], seconds: float) -> None:
        super().__init__(headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        self._pieces = pieces
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; a client that is gone is noticed by who makes the pieces, one that does not read here."""
        async with aclosing(self._pieces) as pieces:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async for piece in pieces:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
