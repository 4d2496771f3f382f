"""Connections of a server: how many there may be, in all and from one client, and how long one may say nothing.

A connection costs a descriptor, of which a process has few (256 on macOS), whether or not a request comes over it. The
class of uvicorn's protocol is given by the servers, the API's and the page's, which alone import it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, NamedTuple

PER_CLIENT = 256
"""connections of one address, unless a server says otherwise"""

HEAD_SECONDS = 10.0
"""how long the head of a request may take, from the connection on or from its first byte"""

_UNREAD_SECONDS = 30.0
"""how long the end of an answer may wait for a client that does not read it"""

_RESERVE = 64
"""descriptors for everything else: files, pipes, the process beside the engine"""

_MOST = 4096
_MOST_DESCRIPTORS = 1 << 16
_SPARE = 8
"""connections beyond the bounds, over which only probes are answered"""

_PROBES = ("/health", "/ready")

Application = Callable[[Any, Any, Callable[[MutableMapping[str, Any]], Awaitable[None]]], Awaitable[None]]


class Room(NamedTuple):
    """What the descriptors of this process allow."""

    total: int
    backlog: int
    """connections that are taken at once, before any of them can be refused"""


def make_room() -> Room:
    """Raise this process's limit of descriptors as far as it may, and share what it leaves."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if most > soft != resource.RLIM_INFINITY:
        with suppress(ValueError, OSError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    left = (_MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft) - _open_descriptors() - _RESERVE
    backlog = max(8, min(128, left // 8))
    # A connection is counted two turns of the event loop after it was taken, and one that is closed lasts for another.
    return Room(max(8, min(_MOST, left - 3 * backlog)), backlog)


def _open_descriptors() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(os.listdir(folder))
    return _RESERVE


class Connections:
    """The open connections of one server. Where one too many comes, the one that was idle longest gives way.

    If all carry requests, the new one is answered too, but to probes alone: who watches the server still hears of it.
    """

    def __init__(self, room: Room, per_client: int = PER_CLIENT) -> None:
        self._total = room.total
        self._per_client = max(1, min(per_client, room.total * 3 // 4))
        self._open: dict[Any, str] = {}

    def admit(self, connection: Any, client: str) -> bool:
        """Count a connection, closing another one where there are too many; False when it may carry probes alone."""
        mine = [other for other, whose in self._open.items() if whose == client]
        crowded = len(mine) >= self._per_client
        full = crowded or len(self._open) >= self._total
        self._open[connection] = client
        if not full:
            return True
        idle = [other for other in (mine if crowded else self._open) if other.idle and not other.spare]
        idle = [other for other in idle if other is not connection]
        if idle:
            idle[0].drop()
            return True
        spare = [other for other in self._open if other.spare]
        for other in spare[: len(spare) + 1 - _SPARE]:
            other.drop()
        return False

    def forget(self, connection: Any) -> None:
        """A connection has ended."""
        self._open.pop(connection, None)


def bounded(protocol: Any, connections: Connections, head_seconds: float = HEAD_SECONDS) -> Any:
    """A class like uvicorn's H11Protocol whose connections are counted, and closed when no request comes in time."""
    return type("Bounded", (_Bounded, protocol), {"_counted": connections, "_head_seconds": head_seconds})


_Protocol: Any = object


class _Bounded(_Protocol):
    """What is added to uvicorn's protocol."""

    _counted: Connections
    _head_seconds: float
    app: Any
    spare = False
    _waiting: Any = None

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def drop(self) -> None:
        """Close at once, whatever was not sent."""
        self._counted.forget(self)
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        client = self.client[0] if self.client else ""
        self.spare = not self._counted.admit(self, client)
        if self.spare:
            self.app = probes_only(self.app)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.idle:
            self._expect_request()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._counted.forget(self)
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(_UNREAD_SECONDS, self.transport.abort)

    def _expect_request(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self._head_seconds, self.drop)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def probes_only(app: Application) -> Application:
    """An application that answers probes and refuses everything else, its connection closed afterwards."""

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
