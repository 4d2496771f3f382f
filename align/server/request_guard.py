"""Checks in front of everything else: Host, Origin and token before a body is read, then the body's size and time.

Any page can make a browser on this machine send requests here. The browser then names the page in Origin (refused
unless it is this server's own) and, after DNS rebinding, the page's host in Host (refused unless it is this server's).
A page can forge neither.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.network import host_of, is_local
from align.server.api_errors import ApiError
from align.server.limits import ServerLimits

_PROBES = ("/health", "/ready")
"""for probes, which have neither the name nor the token"""

_DISCARD_RATIO = 16
"""a body of this many times the limit is still read and discarded, so that the client reads the error"""


class RequestGuard:
    """Middleware that passes a request on with its whole body, or answers it with an error."""

    def __init__(self, app: ASGIApp, limits: ServerLimits, token: str | None, hosts: Collection[str] | None) -> None:
        self._app = app
        self._limits = limits
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
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check(self, headers: Headers) -> None:
        address = headers.get("host", "").lower()
        host = host_of(address)
        if self._hosts is not None and not (is_local(host) or host in self._hosts):
            raise ApiError(421, "this server does not go by the name in the Host header; see --allow-host", code="host")
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != address:
            raise ApiError(403, "pages of other sites may not ask here (Origin header)", code="origin")
        if self._token is not None and not self._has_token(headers.get("authorization", "")):
            raise ApiError(
                401, "no valid key; send the server's token as Authorization: Bearer TOKEN", code="invalid_api_key"
            )

    def _has_token(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        assert self._token is not None
        # Digests have one length, so the time taken does not depend on the token's.
        return hmac.compare_digest(_digest(key.strip()), self._token) and scheme.lower() == "bearer"

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
            raise ApiError(
                408, f"the body did not arrive within {self._limits.body_seconds:g} s; send it faster"
            ) from None
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes; send less text", code="body_too_large")
        return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
