from __future__ import annotations

import asyncio
import logging
import socket

import pytest

from align.arena.web import LocalPageGuard, is_local, is_news, open_port
from align.errors import MachineError, UsageError


def answer(host: str, origin: str = "") -> tuple[int, dict[bytes, bytes]]:
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})

    async def receive():
        return {}

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    asyncio.run(LocalPageGuard(app)({"type": "http", "headers": headers}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1:7860", "127.0.0.2", "[::1]:7860"])
def test_local_names_are_answered_with_security_headers(host):
    status, headers = answer(host)

    assert status == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert headers[b"x"] == b"y"


@pytest.mark.parametrize("host", ["evil.example:7860", "192.168.1.5", "localhost.evil.example", ""])
def test_other_names_are_refused(host):
    assert answer(host)[0] == 421


def test_a_page_elsewhere_cannot_post_here():
    assert answer("127.0.0.1:7860", "http://127.0.0.1:7860")[0] == 200
    for origin in ("https://evil.example", "http://127.0.0.1:9999", "null"):
        assert answer("127.0.0.1:7860", origin)[0] == 403


def test_pages_that_are_open_at_the_end_are_no_errors():
    def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
        cause = (type(error), error, None) if error else None
        return logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, message, (), cause)

    assert not is_news(record("Exception in ASGI application", asyncio.CancelledError()))
    assert not is_news(record("Cancel 3 running task(s), timeout graceful shutdown exceeded"))
    assert is_news(record("Exception in ASGI application", ValueError()))
    assert is_news(record("anything else"))


def test_a_port_in_use_is_named_with_a_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(MachineError, match=f"--port {port}: .*give another --port"):
            open_port("127.0.0.1", port)


def test_an_address_others_can_reach_is_refused_with_the_tunnel():
    with pytest.raises(UsageError, match=r"ssh -L 7860:127\.0\.0\.1:7860"):
        open_port("0.0.0.0", 7860)


def test_local_is_loopback_only():
    assert is_local("::1")
    assert not is_local("10.0.0.1")
    assert not is_local("example.org")


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port_is_refused(port):
    with pytest.raises(UsageError, match="no such port"):
        open_port("127.0.0.1", port)
