"""Addresses, a port to listen on, and limits of a server's connections: how many, from whom, and idle for how long.

A connection costs a file descriptor, of which a process has few (256 on macOS), whether or not a request comes over it.
uvicorn's `limit_concurrency` counts requests only and has no time limit for their headers. Its protocol class is passed
in by the servers of the API and of the page, which alone import uvicorn.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, NamedTuple

from align.errors import MachineError, UsageError

PER_CLIENT = 256
"""the default limit of connections of one address"""

HEADER_TIMEOUT_S = 10.0
"""from the connection, or the first byte of a request, to the end of its headers"""

_UNREAD_TIMEOUT_S = 30.0
"""how long the end of a response may wait for a client that does not read it"""

_RESERVED_DESCRIPTORS = 64
"""for files, pipes and the prompt process"""

_MOST_CONNECTIONS = 4096
_MOST_DESCRIPTORS = 1 << 16
_PROBE_CONNECTIONS = 8
"""connections beyond the limits, over which only probes are answered"""

_PROBES = ("/health", "/ready")

Application = Callable[[Any, Any, Callable[[MutableMapping[str, Any]], Awaitable[None]]], Awaitable[None]]


def is_local(host: str) -> bool:
    """Return whether a name or address is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """Return the host of `host:port`; an IPv6 address is in brackets there."""
    return address[1:].partition("]")[0] if address.startswith("[") else address.partition(":")[0]


def open_port(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that no other process can take the port while the models load.

    Raises UsageError for an invalid address or port, MachineError for a port that is not available.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: no such port; give one from 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror):
            raise UsageError(f"--host {host}: no address of this machine; give 127.0.0.1, or 0.0.0.0 for all") from None
        raise MachineError(
            f"--port {port}: cannot be opened on {host} ({error.strerror}); give another --port, or end what uses it"
        ) from None
    return listener


class ConnectionLimits(NamedTuple):
    """The connections that this process has descriptors for."""

    total: int
    backlog: int
    """connections that are accepted at once, before any of them can be refused"""


def raise_descriptor_limit() -> ConnectionLimits:
    """Raise this process's limit of descriptors as far as allowed, and return the connections it leaves room for."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if most > soft != resource.RLIM_INFINITY:
        with suppress(ValueError, OSError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    free = (_MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft) - _open_descriptors() - _RESERVED_DESCRIPTORS
    backlog = max(8, min(128, free // 8))
    # A connection is counted two turns of the event loop after it was accepted, and a closed one lasts for another.
    return ConnectionLimits(max(8, min(_MOST_CONNECTIONS, free - 3 * backlog)), backlog)


def _open_descriptors() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(os.listdir(folder))
    return _RESERVED_DESCRIPTORS


class OpenConnections:
    """The open connections of one server. Beyond a limit, the one that was idle longest is closed.

    If all carry requests, the new one is answered too, but only for probes, so that monitoring still works.
    """

    def __init__(self, limits: ConnectionLimits, per_client: int = PER_CLIENT) -> None:
        self._total = limits.total
        self._per_client = max(1, min(per_client, limits.total * 3 // 4))
        self._clients: dict[Any, str] = {}

    def admit(self, connection: Any, client: str) -> bool:
        """Count a connection, closing another where there are too many; False when it may carry probes only."""
        same_client = [other for other, address in self._clients.items() if address == client]
        client_full = len(same_client) >= self._per_client
        full = client_full or len(self._clients) >= self._total
        self._clients[connection] = client
        if not full:
            return True
        others = same_client if client_full else [other for other in self._clients if other is not connection]
        idle = next((other for other in others if other.idle and not other.probes_only), None)
        if idle is not None:
            idle.drop()
            return True
        probing = [other for other in self._clients if other.probes_only]
        for other in probing[: len(probing) + 1 - _PROBE_CONNECTIONS]:
            other.drop()
        return False

    def remove(self, connection: Any) -> None:
        """Forget a connection that has ended."""
        self._clients.pop(connection, None)


def limit_connections(protocol: Any, connections: OpenConnections, header_timeout: float = HEADER_TIMEOUT_S) -> Any:
    """Return a class like uvicorn's H11Protocol whose connections are counted, and closed when idle for too long."""
    fields = {"_connections": connections, "_header_timeout": header_timeout}
    return type("LimitedProtocol", (_LimitedProtocol, protocol), fields)


_Protocol: Any = object


class _LimitedProtocol(_Protocol):
    """The methods added to uvicorn's protocol."""

    _connections: OpenConnections
    _header_timeout: float
    app: Any
    probes_only = False
    _timer: Any = None

    @property
    def idle(self) -> bool:
        """Return whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def drop(self) -> None:
        """Close at once, with data still unsent."""
        self._connections.remove(self)
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        client = self.client[0] if self.client else ""
        self.probes_only = not self._connections.admit(self, client)
        if self.probes_only:
            self.app = _answer_probes_only(self.app)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.idle:
            self._start_timer()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._connections.remove(self)
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(_UNREAD_TIMEOUT_S, self.transport.abort)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._header_timeout, self.drop)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _answer_probes_only(app: Application) -> Application:
    """Return an application that refuses everything but probes, closing the connection afterwards."""

    async def limited(scope: Any, receive: Any, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
        if scope["path"] in _PROBES:
            await app(scope, receive, send)
            return
        about = "too many connections are open from this address or in all; close some, or use them again"
        error = {"message": about, "type": "rate_limit_error", "param": None, "code": "too_many_connections"}
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

    return limited
