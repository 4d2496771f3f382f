"""Connections that say little or nothing: one client's cannot take what a server has, and probes are answered."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from serving import PATIENCE, poet, running

from align import network
from align.network import ConnectionLimits, OpenConnections
from align.server.limits import ServerLimits

HERE = Path(__file__).parent
ASK = {"model": "red", "messages": [{"role": "user", "content": "a poem"}]}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with 256 descriptors."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "few_descriptors.py")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))},
    )  # fmt: skip
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    assert process.communicate(timeout=PATIENCE) == ("", "")


def open_lines(stack: ExitStack, url: str, count: int, first: bytes = b"") -> list[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    lines = [stack.enter_context(socket.create_connection((host, int(port)), PATIENCE)) for _ in range(count)]
    for line in lines:
        if first:
            try:
                line.sendall(first)
            except OSError:  # it was closed already
                continue
    return lines


def ask(url: str) -> int:
    return httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=PATIENCE, verify=False).status_code


@pytest.mark.parametrize("first", [b"", pytest.param(b"GET /health HTTP/1.1\r\nHost: loc", marks=pytest.mark.slow)])
def test_idle_connections_and_slow_headers_of_one_client_give_way(url, first):
    with ExitStack() as stack:
        open_lines(stack, url, 300, first)

        assert httpx.get(f"{url}/health", timeout=PATIENCE, verify=False).status_code == 200
        assert ask(url) == 200


@pytest.mark.slow
def test_where_all_connections_carry_requests_probes_are_answered_and_others_told_why(url):
    with ExitStack() as stack:
        open_lines(stack, url, 300, HEAD + b"Content-Length: 1000\r\n\r\n{")

        reply = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=PATIENCE, verify=False)
        assert httpx.get(f"{url}/health", timeout=PATIENCE, verify=False).status_code == 200

    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "too_many_connections")
    assert reply.headers["retry-after"] == "1"
    assert ask(url) == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost",
        pytest.param(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he", marks=pytest.mark.slow),
    ],
)
def test_a_connection_without_a_whole_head_is_closed_in_time(monkeypatch, sent):
    monkeypatch.setattr(network.limit_connections, "__defaults__", (0.2,))
    with running(poet()) as server, ExitStack() as stack:
        [line] = open_lines(stack, server.url, 1, sent)

        while line.recv(4096):
            pass


def test_a_connection_that_carries_a_request_is_not_closed(monkeypatch):
    monkeypatch.setattr(network.limit_connections, "__defaults__", (0.05,))
    with running(poet(0.1)) as server:
        assert ask(server.url) == 200


class Line:
    """A connection as the count sees it."""

    def __init__(self, idle: bool = True) -> None:
        self.idle, self.probes_only, self.open = idle, False, True

    def drop(self) -> None:
        self.open = False
        counted.remove(self)


counted = OpenConnections(ConnectionLimits(12, 8), 4)


def test_the_longest_idle_of_a_full_client_gives_way_and_nobody_elses():
    first, others = Line(), [Line(idle=False) for _ in range(3)]
    elsewhere = [Line() for _ in range(4)]
    for line in elsewhere:
        assert counted.admit(line, "b")
    for line in (first, *others):
        assert counted.admit(line, "a")

    assert counted.admit(Line(idle=False), "a")
    assert not first.open
    assert not counted.admit(Line(), "a")
    assert all(line.open for line in (*others, *elsewhere))
    for number in range(3):
        assert counted.admit(Line(), f"other {number}")
    assert counted.admit(Line(), "one more")
    assert not elsewhere[0].open


def test_a_client_may_have_as_many_as_a_server_says():
    with running(poet(), limits=ServerLimits(max_connections=2)) as server, ExitStack() as stack:
        lines = open_lines(stack, server.url, 3)

        assert lines[0].recv(1) == b""
        lines[2].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert lines[2].recv(12) == b"HTTP/1.1 200"
