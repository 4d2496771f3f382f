"""Serving the page on a local address, with a check of every request and a port that is really free."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from align import network
from align.errors import UsageError
from align.network import Application, OpenConnections, host_of, is_local, limit_connections, raise_descriptor_limit

# An answer is markdown from a model: without this, an image in it makes the reader's browser call any address it names.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
_HEADERS = [
    (b"content-security-policy", _CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class LocalPageGuard:
    """ASGI middleware that adds security headers and answers requests of local names and own pages only.

    A page elsewhere can point a name of its own at this machine's loopback address and so read what is here; it cannot
    make the browser send another Host header. It can have the browser post here, but not without an Origin header.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it: 421 under a foreign host name, 403 from a foreign page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))  # the first of a name counts
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        refusal = None
        if not is_local(host_of(host)):
            refusal = 421, b"this page answers to localhost only\n"
        elif origin and origin.partition("://")[2] != host:
            refusal = 403, b"this page takes requests of its own pages only\n"
        if refusal is not None:
            await send({"type": "http.response.start", "status": refusal[0], "headers": []})
            await send({"type": "http.response.body", "body": refusal[1]})
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_guarded)


def open_port(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a local address; see `align.network.open_port`.

    Raises UsageError for an address that other machines can reach.
    """
    if not is_local(host):
        raise UsageError(
            f"--host {host}: others could reach it and the page has no password; keep 127.0.0.1 and, from another "
            f"machine, run ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
        )
    return network.open_port(host, port)


def make_server(app: Application) -> Any:
    """Return a uvicorn server for the page; `run(sockets=[...])` serves until it is interrupted."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    limits = raise_descriptor_limit()
    # Open pages hold a connection for ever; shutting down must not wait for them.
    config = uvicorn.Config(
        LocalPageGuard(app), log_level="warning", timeout_graceful_shutdown=1,
        http=limit_connections(H11Protocol, OpenConnections(limits)), ws="none", backlog=limits.backlog,
    )  # fmt: skip
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(is_news)
    return server


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a log record is more than a notice of pages that were open at shutdown."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and "graceful shutdown exceeded" not in record.getMessage()
