"""A port that is really free, and a server that ends in order: what runs is finished, what comes is told to go."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from align.errors import MachineError, UsageError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from align.server.service import Service

_TICK = 0.05
"""seconds between looks at whether all has ended"""

_LAST_SECONDS = 3
"""how long connections may take to close when nothing is being written any more"""


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody can take the port while the models load.

    Raises UsageError for what is no address or port, MachineError for a port that cannot be had.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: no such port; give one from 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except socket.gaierror:
        listener.close()
        raise UsageError(f"--host {host}: no address of this machine; give 127.0.0.1, or 0.0.0.0 for all") from None
    except OSError as error:
        listener.close()
        raise MachineError(
            f"--port {port}: cannot be opened on {host} ({error.strerror}); give another --port, or end what uses it"
        ) from None
    return listener


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

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_LAST_SECONDS
    )
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
