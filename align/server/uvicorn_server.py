"""Uvicorn with a graceful shutdown: running answers are finished, new requests get 503."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from align.network import OpenConnections, limit_connections, raise_descriptor_limit

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from align.server.service import Service

_POLL_S = 0.05

_CLOSE_TIMEOUT_S = 3
"""how long connections may take to close once no answer is running"""


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listener."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_until_ended(app: ASGIApp, listener: socket.socket, service: Service) -> None:
    """Serve until SIGTERM, Ctrl-C or `service.draining`, and then until running answers have ended.

    The port stays open meanwhile, so that new requests get 503 and not a refused connection. A second signal cancels
    running answers.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    limits = raise_descriptor_limit()
    protocol = limit_connections(H11Protocol, OpenConnections(limits, service.limits.max_connections))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        http=protocol, ws="none", backlog=limits.backlog,
    )  # fmt: skip
    server = uvicorn.Server(config)
    cancel_running = threading.Event()

    def end(_signal: int, _frame: Any) -> None:
        if service.draining:
            cancel_running.set()
        service.draining = True

    # uvicorn's own handler closes the port at once, and ends the process by the signal rather than with 0.
    server.handle_exit = end
    asyncio.run(_serve(server, listener, service, cancel_running))


async def _serve(server: Any, listener: socket.socket, service: Service, cancel_running: threading.Event) -> None:
    ending = asyncio.create_task(_end_when_drained(server, service, cancel_running))
    await server.serve(sockets=[listener])
    ending.cancel()


async def _end_when_drained(server: Any, service: Service, cancel_running: threading.Event) -> None:
    while not service.draining:
        await asyncio.sleep(_POLL_S)
    deadline = time.monotonic() + service.limits.drain_seconds
    while service.running and time.monotonic() < deadline and not cancel_running.is_set():
        await asyncio.sleep(_POLL_S)
    if service.running and service.engine is not None:
        # Answers that still run end with an error.
        await asyncio.to_thread(service.engine.close)
    server.should_exit = True
