"""The middleware around the API: a guard in front of everything else, and outermost one log line for every request.

Any page can make a browser on this machine send requests here. The browser then names the page in Origin (refused
unless it is this server's own) and, after DNS rebinding, the page's host in Host (refused unless it is this server's).
A page can forge neither.

Neither log nor metrics hold anything a client wrote: paths and models are those of this server, and of an unforeseen
error only its type and place are logged, because its message could quote the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.network import host_of, is_local
from align.server.api_errors import ApiError, internal_error
from align.server.limits import ServerLimits
from align.server.service import LOG, Service

_PROBES = ("/health", "/ready")
"""for probes, which have neither the name nor the token"""

_DISCARD_RATIO = 16
"""a body of this many times the limit is still read and discarded, so that the client reads the error"""

CLIENT_GONE = 499
"""nginx's status for a client that went away; for the log and the metrics only"""

SCOPE_KEY = "align.request"
"""of the `RequestRecord` of a request, made when it came in"""

_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE")
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health", "/ready", "/ui")
_QUIET = ("/metrics", "/health", "/ready", "/ui")
"""requested every few seconds: counted, and logged only when they are refused or fail"""


class RequestGuard:
    """Middleware that passes a request on with its whole body, or answers it with an error."""

    def __init__(self, app: ASGIApp, limits: ServerLimits, token: str | None, hosts: Collection[str] | None) -> None:
        self._app, self._limits = app, limits
        self._token = None if token is None else _digest(token)
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            if scope["path"] not in _PROBES:
                self._check(Headers(scope=scope))
            body = await self._read(receive)
        except ApiError as refusal:
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)
            return
        if body is None:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replayed, send)

    def _check(self, headers: Headers) -> None:
        address = headers.get("host", "").lower()
        host = host_of(address)
        if self._hosts is not None and not (is_local(host) or host in self._hosts):
            raise ApiError(421, "this server does not go by the name in the Host header; see --allow-host", code="host")
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != address:
            raise ApiError(403, "pages of other sites may not ask here (Origin header)", code="origin")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests have one length, so the time taken does not depend on the token's.
        if self._token is not None and not (
            hmac.compare_digest(_digest(key.strip()), self._token) and scheme.lower() == "bearer"
        ):
            about = "no valid key; send the server's token as Authorization: Bearer TOKEN"
            raise ApiError(401, about, code="invalid_api_key")

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body; None when the client went away before its end."""
        most = self._limits.max_body_bytes
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while size <= most * _DISCARD_RATIO:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(chunk := message.get("body", b""))
                    if size <= most:
                        chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            about = f"the body did not arrive within {self._limits.body_seconds:g} s; send it faster"
            raise ApiError(408, about) from None
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes; send less text", code="body_too_large")
        return b"".join(chunks)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass
class RequestRecord:
    """The logged fields of a request besides its status."""

    model: str = ""
    id: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int | None = None
    """where it ended otherwise than with the status sent"""


class RequestLog:
    """The outermost middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[SCOPE_KEY] = RequestRecord()
        status = 0
        started = time.perf_counter()

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        counted = scope["path"].startswith("/v1/")
        self._service.running += counted
        try:
            await self._app(scope, receive, send_recorded)
        except asyncio.CancelledError:
            record.status = 503
            if not self._service.draining:
                raise
        except Exception as error:  # as it is, it could put a prompt into the log or the response
            frame = traceback.extract_tb(error.__traceback__)[-1]  # at least the call above is in it
            LOG.error("%s at %s:%s (%s)", type(error).__name__, frame.filename, frame.lineno, frame.name)
            record.status = 500
            if not status:
                await JSONResponse(internal_error().body, 500)(scope, receive, send_recorded)
        finally:
            self._service.running -= counted
            self._write(scope, record, record.status or status or CLIENT_GONE, time.perf_counter() - started)

    def _write(self, scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
        path = next((one for one in _PATHS if f"{scope['path']}/".startswith(f"{one}/")), "other")
        self._service.metrics.requests.labels(path, record.model, str(status)).inc()
        if path in _QUIET and (status < 400 or status == 503):
            return
        about = f" model={record.model} id={record.id}" if record.model else ""
        tokens = f" prompt_tokens={record.prompt_tokens} completion_tokens={record.completion_tokens}" if about else ""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        LOG.info("%s %s %d seconds=%.3f%s%s", method, path, status, seconds, about, tokens)
