"""Servers in a thread, over engines that are fixed or real, and clients for them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from fake_engine import FakeEngine

from align.engine.protocol import Engine
from align.network import open_port
from align.server.application import address_of, create_app, serve_until_ended
from align.server.limits import ServerLimits
from align.server.served_models import ServedModel, ServedModels
from align.server.service import Service

KEY = "a-key-that-only-the-tests-know"
PATIENCE = 120
"""seconds that a machine may be busy with other things"""
POEM = "roses are red violets are blue sugar is sweet and so are you"


def served(*references: str) -> ServedModels:
    """Models as `describe` would give them, with an alias each."""
    return ServedModels(
        [
            ServedModel(
                ref, (ref, ref.partition("@")[0], ref.partition("@")[0] + "@prod"), "base@v1", "base@v1", "sha256:1f"
            )
            for ref in references
        ]
    )


def poet(pause: float = 0.0, most: int | None = None, gate: threading.Event | None = None) -> FakeEngine:
    """An engine that recites, however it is asked; `fail` as a prompt makes a row fail.

    With a `gate`, a row that has said its first word says the next one when the gate is set.
    """

    def reply(row: Any) -> str | None:
        said = row.text if row.text is not None else row.messages[-1]["content"]
        return None if said == "fail" else POEM

    def holds(_row: Any, words: int) -> bool:
        return gate is not None and words > 0 and not gate.is_set()

    return FakeEngine(["red@v1", "blue@v1"], reply, pause, max_waiting_rows=most, holds=holds)


def until(condition: Callable[[], Any]) -> None:
    """Wait for something."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass(frozen=True)
class Running:
    """A server and where it is."""

    url: str
    service: Service
    thread: threading.Thread

    def get(self, path: str, **headers: str) -> httpx.Response:
        """The answer to a GET."""
        return httpx.get(self.url + path, headers=headers, timeout=PATIENCE, verify=False)

    def knock(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Post something over a bare connection, to be read, left alone or closed at any moment."""
        host, port = self.url.removeprefix("http://").split(":")
        sent = json.dumps(body).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(sent)}"
        line = socket.create_connection((host, int(port)), timeout=PATIENCE)
        line.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n".encode() + sent)
        return line

    def client(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, told to send everything here and nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, **options)


@contextmanager
def running(
    engine: Engine | None,
    models: ServedModels | None = None,
    limits: ServerLimits | None = None,
    token: str | None = None,
    hosts: Sequence[str] | None = (),
    page: Any = None,
) -> Iterator[Running]:
    """A server on a free port, ended in order afterwards."""
    models = models or served("red@v1", "blue@v1")
    app = create_app(engine, models, limits or ServerLimits(drain_seconds=PATIENCE), token, page, hosts)
    service = app.state.service
    with open_port("127.0.0.1", 0) as listener:
        url = address_of(listener)
        thread = threading.Thread(target=serve_until_ended, args=(app, listener, service), daemon=True)
        thread.start()
        yield Running(url, service, thread)
        service.draining = True
        thread.join(PATIENCE)
    assert not thread.is_alive()
