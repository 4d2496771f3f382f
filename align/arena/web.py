"""Serving the page: a local address, a guard in front of every request, and a port that is really free."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from align import listening
from align.arena.page_assets import CONTENT_SECURITY_POLICY
from align.connections import Connections, bounded, make_room
from align.errors import UsageError
from align.listening import host_of, is_local

_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


class LocalPageGuard:
    """Adds the security headers to every response, and answers only to local names.

    A page elsewhere can point a name of its own at this machine's loopback address and so read what is here; it cannot
    make the browser send another Host header. It can have the browser post here, but not without an Origin header.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not is_local(host_of(_header(scope, b"host"))):
            await send({"type": "http.response.start", "status": 421, "headers": []})
            await send({"type": "http.response.body", "body": b"this page answers to localhost only\n"})
            return

        if not _is_own(scope):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this page takes requests of its own pages only\n"})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_guarded)


def _header(scope: Message, wanted: bytes) -> str:
    return str(next((value for name, value in scope["headers"] if name == wanted), b"").decode("latin-1"))


def _is_own(scope: Message) -> bool:
    """Whether a request comes from a page of this server, or from no page at all."""
    origin = _header(scope, b"origin")
    return not origin or origin.partition("://")[2] == _header(scope, b"host")


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens on a local address; see `align.listening.open_port`.

    Raises UsageError for an address others can reach, too.
    """
    if not is_local(host):
        raise UsageError(
            f"--host {host}: others could reach it and the page has no password; keep 127.0.0.1 and, from another "
            f"machine, run ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
        )
    return listening.open_port(host, port)


def make_server(app: Application) -> Any:
    """A uvicorn server for the page; `run(sockets=[...])` serves until it is interrupted."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    room = make_room()
    # Open pages hold a connection for ever; ending must not wait for them.
    config = uvicorn.Config(
        LocalPageGuard(app), log_level="warning", timeout_graceful_shutdown=1,
        http=bounded(H11Protocol, Connections(room)), ws="none", backlog=room.backlog,
    )  # fmt: skip
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(is_news)
    return server


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the server's log says more than that pages were open when it ended."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and "graceful shutdown exceeded" not in record.getMessage()
