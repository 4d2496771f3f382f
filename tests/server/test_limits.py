"""Full queues, slow answers, gone clients, the way in and the way out; what is counted and what is written down."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from serving import PATIENCE, POEM, Running, poet, running, until

from align.errors import UsageError
from align.server.limits import ServerLimits

CHAT = "/v1/chat/completions"
ASK = {"model": "red", "messages": [{"role": "user", "content": "xyzzy-secret"}]}


def held(most: int | None = None) -> FakeEngine:
    """An engine that says one word of every answer and no more."""
    return poet(0.01, most, threading.Event())


def post(server: Running, **more) -> httpx.Response:
    return httpx.post(server.url + CHAT, json={**ASK, **more}, timeout=PATIENCE, verify=False)


def test_a_flood_is_told_when_to_come_back_and_the_server_stays_up():
    gate = threading.Event()
    with running(poet(0.01, most=4, gate=gate)) as server:
        with ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(post, server) for _ in range(40)]
            until(lambda: sum(each.done() for each in asked) == 36)
            gate.set()

        statuses = [each.result().status_code for each in asked]
        refused = [each.result() for each in asked if each.result().status_code == 429]
        assert (statuses.count(200), statuses.count(429)) == (4, 36)
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert refused[0].json()["error"]["code"] == "queue_full"
        assert post(server).status_code == 200


def test_the_client_library_takes_a_full_queue_for_a_rate_limit():
    with running(held(most=1)) as server, server.client() as client:
        stream = client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**ASK)
        stream.close()


def test_an_answer_that_takes_too_long_is_given_up_and_its_row_freed():
    engine = held()
    with running(engine, limits=ServerLimits(max_seconds=0.5)) as server:
        reply = post(server)
        until(lambda: engine.waiting == 0)

    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "timeout"


def test_an_error_after_a_stream_began_is_its_last_event(monkeypatch):
    # Only in this server's thread: loops of pages that other tests left would sleep until the others have caught up.
    late, real = set(), asyncio.BaseEventLoop.time
    monkeypatch.setattr(
        asyncio.BaseEventLoop, "time", lambda loop: real(loop) + 1001 * (threading.current_thread() in late)
    )
    monkeypatch.setattr("align.server.routes._TIMEOUT_EVENT_S", 1e6)
    with running(held(), limits=ServerLimits(max_seconds=1000)) as server, server.client() as client:
        chunks = client.chat.completions.create(**ASK, stream=True)
        said = [next(chunks).choices[0].delta.content for _ in range(2)]
        late.add(server.thread)
        with pytest.raises(openai.APIError, match="no end within") as caught:
            list(chunks)

    assert said == ["", "roses "]
    assert caught.value.code == "timeout"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(stream):
    engine = held()
    with running(engine) as server:
        with server.knock(CHAT, {**ASK, "stream": stream}) as line:
            until(lambda: engine.waiting == 1)
            assert not stream or line.recv(1)
        until(lambda: engine.waiting == 0)
        until(lambda: b'status="499"' in server.service.metrics.text())
        until(lambda: server.service.running == 0)


def test_a_client_that_never_reads_is_given_up():
    asked = threading.Event()
    long = FakeEngine(["red@v1"], lambda _row: asked.set() or "x" * 20_000_000)
    with running(long, limits=ServerLimits(max_seconds=0.3)) as server:
        with server.knock(CHAT, {**ASK, "stream": True}):
            until(asked.is_set)
            until(lambda: server.service.running == 0)
        assert server.get("/health").status_code == 200


def test_until_the_models_are_loaded_the_server_lives_and_is_not_ready():
    with running(None) as server:
        assert server.get("/health").json() == {"status": "ok"}
        assert (server.get("/ready").status_code, post(server).status_code) == (503, 503)
        assert server.get("/v1/models").status_code == 200

        server.service.engine = poet()

        assert (server.get("/ready").status_code, post(server).status_code) == (200, 200)


def test_on_the_way_out_streams_are_finished_and_new_requests_refused():
    gate = threading.Event()
    with running(poet(0.01, gate=gate)) as server, server.client() as client:
        stream = client.chat.completions.create(**ASK, stream=True)
        next(iter(stream))

        server.service.draining = True
        refused, probe = post(server), server.get("/ready")
        gate.set()
        rest = [chunk.choices[0].delta.content or "" for chunk in stream]

    assert (refused.status_code, probe.status_code) == (503, 503)
    assert refused.headers["retry-after"]
    assert "".join(rest) == POEM


def test_what_does_not_end_in_time_is_told_so_on_the_way_out():
    engine = held()
    with running(engine, limits=ServerLimits(drain_seconds=0.3)) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server)
        until(lambda: engine.waiting == 1)
        server.service.draining = True
        assert waiting.result().status_code == 503


def test_requests_tokens_and_times_are_counted_by_model():
    engine = poet(pause=0.01)
    with running(engine) as server, server.client() as client:
        list(client.chat.completions.create(**ASK, stream=True))
        client.chat.completions.create(**{**ASK, "model": "blue"})
        server.get("/made/up")
        text = server.get("/metrics").text

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
        server.get("/made/up/xyzzy-secret?xyzzy-secret=1")
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
        ServerLimits(max_waiting=0)
    with pytest.raises(UsageError, match="max_seconds=nan"):
        ServerLimits(max_seconds=float("nan"))


def test_many_clients_that_leave_at_once_leave_nothing_behind():
    engine = held()
    before = threading.active_count()
    with running(engine) as server:
        lines = [server.knock(CHAT, ASK) for _ in range(20)]
        until(lambda: engine.waiting == 20)
        for line in lines:
            line.close()
        until(lambda: engine.waiting == 0)
        until(lambda: server.service.running == 0)
    until(lambda: threading.active_count() <= before + 1)
