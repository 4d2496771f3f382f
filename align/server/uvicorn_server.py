"""A server that ends in order: what runs is finished, what comes is told to go."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from align.connections import Connections, bounded, make_room

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from align.server.service import Service

_TICK = 0.05
"""seconds between looks at whether all has ended"""

_LAST_SECONDS = 3
"""how long connections may take to close when nothing is being written any more"""


def address_of(listener: socket.socket) -> str:
    """The URL a listener is reached at."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_until_ended(app: ASGIApp, listener: socket.socket, service: Service) -> None:
    """Serve until SIGTERM or Ctrl-C, or until `service.draining` is set, and what runs then has ended.

    The port stays open meanwhile: new requests are told 503 rather than left without an answer. A second signal
    ends what runs.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    room = make_room()
    protocol = bounded(H11Protocol, Connections(room, service.limits.max_connections))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_LAST_SECONDS,
        http=protocol, ws="none", backlog=room.backlog,
    )  # fmt: skip
    server = uvicorn.Server(config)
    hurry = threading.Event()

    def end(_signal: int, _frame: Any) -> None:
        if service.draining:
            hurry.set()
        service.draining = True

    # uvicorn's own handler closes the port at once, and ends the process by the signal rather than with 0.
    server.handle_exit = end
    asyncio.run(_serve(server, listener, service, hurry))


async def _serve(server: Any, listener: socket.socket, service: Service, hurry: threading.Event) -> None:
    ending = asyncio.create_task(_end_when_drained(server, service, hurry))
    await server.serve(sockets=[listener])
    ending.cancel()


async def _end_when_drained(server: Any, service: Service, hurry: threading.Event) -> None:
    while not service.draining:
        await asyncio.sleep(_TICK)
    deadline = time.monotonic() + service.limits.drain_seconds
    while service.running and time.monotonic() < deadline and not hurry.is_set():
        await asyncio.sleep(_TICK)
    if service.running and service.engine is not None:
        # What still runs ends with an error, which its client is told.
        await asyncio.to_thread(service.engine.close)
    server.should_exit = True
