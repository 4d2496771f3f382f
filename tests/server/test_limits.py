"""Full queues, slow answers, gone clients, the way in and the way out; what is counted and what is written down."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import POEM, Running, poet, running

from align.engine.fake import FakeEngine
from align.errors import UsageError
from align.server.limits import Limits

CHAT = "/v1/chat/completions"
ASK = {"model": "red", "messages": [{"role": "user", "content": "xyzzy-secret"}]}


def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def post(server: Running, **more) -> httpx.Response:
    return httpx.post(server.url + CHAT, json={**ASK, **more}, timeout=30, verify=False)


def test_a_flood_is_told_when_to_come_back_and_the_server_stays_up():
    with running(poet(pause=0.02, most=4)) as server:
        with ThreadPoolExecutor(40) as pool:
            replies = list(pool.map(lambda _: post(server), range(40)))

        statuses = [reply.status_code for reply in replies]
        refused = [reply for reply in replies if reply.status_code == 429]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert refused[0].json()["error"]["code"] == "queue_full"
        assert post(server).status_code == 200


def test_the_client_library_takes_a_full_queue_for_a_rate_limit():
    with running(poet(pause=0.1, most=1)) as server, server.client() as client:
        stream = client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**ASK)
        stream.close()


def test_an_answer_that_takes_too_long_is_given_up_and_its_row_freed():
    engine = poet(pause=0.2)
    with running(engine, limits=Limits(max_seconds=0.5)) as server:
        reply = post(server)
        until(lambda: engine.waiting == 0, 1.5)

    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "timeout"


def test_an_error_after_a_stream_began_is_its_last_event():
    with running(poet(pause=0.3), limits=Limits(max_seconds=1.5)) as server, server.client() as client:
        chunks = client.chat.completions.create(**ASK, stream=True)
        said = [next(chunks).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError, match="no end within") as caught:
            list(chunks)

    assert said == ["", "roses "]
    assert caught.value.code == "timeout"


def leave(client: httpx.Client, body: dict) -> None:
    """Ask, and go when the first piece has come or the client's own time is over."""
    try:
        with client.stream("POST", CHAT, json=body) as reply:
            next(reply.iter_raw())
    except httpx.ReadTimeout:
        assert not body.get("stream")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(stream):
    engine = poet(pause=0.3)
    with running(engine) as server:
        with httpx.Client(base_url=server.url, timeout=5 if stream else 0.25, verify=False) as client:
            leave(client, {**ASK, "stream": stream})
        until(lambda: engine.waiting == 0, 2)
        until(lambda: b'status="499"' in server.service.metrics.text(), 1)
        assert server.service.running == 0


def test_a_client_that_never_reads_is_given_up():
    long = FakeEngine(["red@v1"], lambda _row: "x" * 20_000_000)
    with running(long, limits=Limits(max_seconds=0.3)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({**ASK, "stream": True}).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: server.service.running == 1)
            until(lambda: server.service.running == 0, 4)
        assert httpx.get(server.url + "/health", verify=False).status_code == 200


def test_until_the_models_are_loaded_the_server_lives_and_is_not_ready():
    with running(None) as server:
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        assert (httpx.get(server.url + "/ready").status_code, post(server).status_code) == (503, 503)
        assert httpx.get(server.url + "/v1/models").status_code == 200

        server.service.engine = poet()

        assert (httpx.get(server.url + "/ready").status_code, post(server).status_code) == (200, 200)


def test_on_the_way_out_streams_are_finished_and_new_requests_refused():
    with running(poet(pause=0.2)) as server, server.client() as client:
        stream = client.chat.completions.create(**ASK, stream=True)
        next(iter(stream))

        server.service.draining = True
        refused, probe = post(server), httpx.get(server.url + "/ready")
        rest = [chunk.choices[0].delta.content or "" for chunk in stream]

    assert (refused.status_code, probe.status_code) == (503, 503)
    assert refused.headers["retry-after"]
    assert "".join(rest) == POEM


def test_what_does_not_end_in_time_is_told_so_on_the_way_out():
    engine = poet(pause=5)
    limits = Limits(drain_seconds=0.3, max_seconds=1.5)
    with running(engine, limits=limits) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server)
        until(lambda: engine.waiting == 1)
        server.service.draining = True
        assert waiting.result().status_code in (503, 504)


def test_requests_tokens_and_times_are_counted_by_model():
    engine = poet(pause=0.01)
    with running(engine) as server, server.client() as client:
        list(client.chat.completions.create(**ASK, stream=True))
        client.chat.completions.create(**{**ASK, "model": "blue"})
        httpx.get(server.url + "/made/up")
        text = httpx.get(server.url + "/metrics").text

    words = len(POEM.split())
    for line in (
        'align_requests_total{model="red@v1",path="/v1/chat/completions",status="200"} 1.0',
        'align_requests_total{model="",path="other",status="404"} 1.0',
        f'align_completion_tokens_total{{model="red@v1"}} {words}.0',
        'align_prompt_tokens_total{model="blue@v1"} 1.0',
        'align_time_to_first_token_seconds_count{model="red@v1"} 1.0',
        f'align_inter_token_seconds_count{{model="red@v1"}} {words - 1}.0',
        'align_request_seconds_count{model="blue@v1"} 1.0',
        'align_requests_running{model="red@v1"} 0.0',
        'align_requests_waiting{model="red@v1"} 0.0',
        "align_queue_depth 0.0",
    ):
        assert line in text.splitlines()


class BrokenEngine:
    """An engine with a bug that quotes the prompt."""

    waiting = 0
    models = ("red@v1",)

    def submit(self, request):
        raise ZeroDivisionError(request.rows[0].messages[0]["content"])


def test_lines_tell_what_happened_and_never_what_was_said(caplog):
    caplog.set_level(logging.INFO)
    with running(poet()) as server:
        post(server)
        post(server, temperature=9)
        httpx.get(server.url + "/made/up/xyzzy-secret?xyzzy-secret=1")
        server.service.engine = BrokenEngine()
        reply = post(server)

    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name != "httpx")
    assert "xyzzy" not in ours + reply.text
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "model=red@v1" in caplog.text
    assert "ZeroDivisionError at " in caplog.text


def test_limits_that_allow_nothing_are_refused():
    with pytest.raises(UsageError, match="max_waiting=0"):
        Limits(max_waiting=0)
    with pytest.raises(UsageError, match="max_seconds=nan"):
        Limits(max_seconds=float("nan"))


def test_many_clients_that_leave_at_once_leave_nothing_behind():
    engine = poet(pause=0.3)
    before = threading.active_count()
    with running(engine) as server:

        def leave(_: int) -> None:
            with (
                httpx.Client(base_url=server.url, timeout=0.2, verify=False) as client,
                pytest.raises(httpx.ReadTimeout),
            ):
                client.post(CHAT, json=ASK)

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(leave, range(20)))
        until(lambda: engine.waiting == 0, 2)
        until(lambda: server.service.running == 0, 1)
    until(lambda: threading.active_count() <= before + 1)
