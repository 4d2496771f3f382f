"""Who is answered, what is taken, and what is told of failures."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from serving import KEY, PATIENCE, Running, poet, running

from align.server.limits import ServerLimits

CHAT = "/v1/chat/completions"
ASK = {"model": "red", "messages": [{"role": "user", "content": "a poem"}]}
SMALL = ServerLimits(max_body_bytes=2000, body_seconds=PATIENCE, drain_seconds=PATIENCE)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(poet(), limits=SMALL) as started:
        yield started


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx.Client]:
    """A server with a token that goes by one more name."""
    with (
        running(poet(), token=KEY, hosts=["models.example"]) as started,
        httpx.Client(base_url=started.url, timeout=PATIENCE) as client,
    ):
        yield client


def error_of(response: httpx.Response) -> dict:
    """The error of a refusal, which always has one shape."""
    assert response.json().keys() == {"error"}
    error: dict = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", ""])
def test_a_name_that_was_pointed_at_this_machine_is_refused(http, host):
    response = http.get("/v1/models", headers={"host": host})

    assert response.status_code == 421
    assert error_of(response)["code"] == "host"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.8.8.8:1", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine_are_answered(http, host):
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_name_that_was_allowed_is_answered(guarded):
    headers = {"host": "models.example", "authorization": f"Bearer {KEY}"}

    assert guarded.get("/v1/models", headers=headers).status_code == 200
    assert guarded.get("/v1/models", headers={**headers, "host": "other.example"}).status_code == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://"])
def test_a_page_of_another_site_may_not_ask(http, origin):
    response = http.post(CHAT, json=ASK, headers={"origin": origin})

    assert response.status_code == 403
    assert error_of(response)["code"] == "origin"


def test_a_page_of_this_server_may_ask(server, http):
    assert http.post(CHAT, json=ASK, headers={"origin": server.url}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_what_is_not_sent_as_json_is_no_request_and_told_how_to_be_one(http, kind):
    headers = {} if kind is None else {"content-type": kind}

    response = http.post(CHAT, content=json.dumps(ASK), headers=headers)

    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing", "/docs"])
@pytest.mark.parametrize("given", [None, "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer \u00e9"])
def test_without_the_token_nothing_is_told(guarded, path, given):
    headers = {} if given is None else {"authorization": given.encode()}

    response = guarded.get(path, headers=headers)

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_neither_token_nor_name(guarded, path):
    assert guarded.get(path, headers={"host": "10.0.0.7:8000"}).status_code == 200


def test_a_body_that_is_too_large_is_refused_and_the_refusal_can_be_read(http):
    for size in (2001, 30_000, 1_000_000):
        response = http.post(CHAT, content=b"x" * size, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"


def test_a_body_that_is_too_large_is_refused_however_it_is_sent(http):
    response = http.post(CHAT, content=(b"x" * 900 for _ in range(3)))

    assert response.status_code == 413


def test_a_body_that_never_ends_is_given_up():
    with running(poet(), limits=ServerLimits(body_seconds=0.5, drain_seconds=PATIENCE)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as line:
            line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert line.recv(12) == b"HTTP/1.1 408"


DEEP = b'{"model":"red","messages":' + b"[" * 900 + b"]" * 900 + b"}"
BODIES = [
    (b"", None),
    (b"{", "invalid_json"),
    (b"[]", None),
    (b"null", None),
    (b'"text"', None),
    (b"\xff\xfe", None),
    (DEEP, None),
    (b"[" * 1900, None),
    (b'{"model": "red"}', "missing_required_parameter"),
    (b'{"model": 5, "messages": [{"role": "user", "content": "x"}]}', "invalid_value"),
    (b'{"model": "red", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_value"),
    (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', "invalid_value"),
    (b'{"model": "red", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "invalid_value"),
    (b'{"model": "red", "messages": [{"role": "user", "content": "x"}], "stop": ["\\udfff"]}', "invalid_value"),
    (b'{"model": "red", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}', "invalid_value"),
]


@pytest.mark.parametrize(("body", "code"), BODIES)
def test_what_is_no_request_is_told_so(http, body, code):
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400
    assert code in (None, error_of(response)["code"])
    assert "Traceback" not in response.text


def test_surrogates_in_fields_that_nobody_reads_do_no_harm(http):
    body = b'{"model": "red", "messages": [{"role": "user", "content": "x"}], "user": "\\ud800"}'

    assert http.post(CHAT, content=body, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/%00%ff", 404),
        ("POST", "/v1/embeddings", 404),
        ("OPTIONS", CHAT, 405),
    ],
)
def test_other_paths_and_methods_are_refused_in_the_same_shape(http, method, path, status):
    response = http.request(method, path)

    assert response.status_code == status
    error_of(response)


def test_answers_are_not_sniffed_and_streams_are_not_buffered(http):
    assert http.get("/v1/models").headers["x-content-type-options"] == "nosniff"
    with http.stream("POST", CHAT, json={**ASK, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_a_client_that_leaves_before_its_body_has_come_is_counted_as_gone():
    with running(poet(), limits=ServerLimits(drain_seconds=PATIENCE)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as line:
            line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        while b'status="' not in (text := server.service.metrics.text()):
            time.sleep(0.01)

    assert b'status="499"' in text
