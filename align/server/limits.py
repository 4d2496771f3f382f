"""The limits of a server, each with the status of a request beyond it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from align.errors import UsageError
from align.network import PER_CLIENT


@dataclass(frozen=True)
class ServerLimits:
    """Limits of requests and connections, all above 0."""

    max_tokens: int = 1024
    """longest answer, in tokens; 422 beyond"""
    max_prompts: int = 64
    """most prompts of a request; 422 beyond"""
    max_body_bytes: int = 1 << 20
    """largest request body; 413 beyond"""
    max_waiting: int = 128
    """most rows that wait for the engine; 429 beyond"""
    max_seconds: float = 300.0
    """longest time from a request to the end of its answer; 504, or an error event in a stream, beyond"""
    body_seconds: float = 20.0
    """longest time a body may take to arrive; 408 beyond"""
    max_connections: int = PER_CLIENT
    """most connections of one client address, three quarters of what the descriptors allow at most; beyond, those that
    are idle give way, and else 429. Behind a proxy all clients have its address"""
    drain_seconds: float = 30.0
    """how long running answers may continue after SIGTERM"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise UsageError(f"{field.name}={value}: nothing could be served; give more than 0")
