"""A judge that is down, slow, overloaded or talks nonsense, on a real HTTP server: counted, told, never scored."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from align.errors import MachineError, UsageError
from align.evaluation import remote_judge
from align.evaluation.jsonl_store import JsonlStore
from align.evaluation.metric import Verdicts, compare_verdicts
from align.evaluation.remote_judge import RemoteJudge, judge_at, read_verdict
from align.schema import Record, user

RECORDS = [Record(prompt=[user(f"question {place}")]) for place in range(8)]
GOOD, BAD = ["good"] * 8, ["bad"] * 8

GeneratedAnswer = Callable[[dict[str, Any], int], Any]
"""from a request's body and its number to the judge's text, or (status, headers)"""


class JudgeServer(ThreadingHTTPServer):
    """A small OpenAI-compatible server that answers what a function says."""

    daemon_threads = True

    def __init__(self, answer: GeneratedAnswer, models: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.models = answer, models
        self.complaint: Any = "no"
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is what some of these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            number = len(self.server.bodies)
        found = self.server.answer(body, number)
        if isinstance(found, tuple):
            self._send(found[0], {"error": self.server.complaint}, found[1])
        else:
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": found}}]})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for key, each in ({"Content-Length": str(len(text))} | (headers or {})).items():
            self.send_header(key, each)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., JudgeServer]]:
    servers: list[JudgeServer] = []

    def start(answer: GeneratedAnswer, models: list[str] | None = None) -> JudgeServer:
        server = JudgeServer(answer, ["judge"] if models is None else models)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _judge(url: str, **options: Any) -> RemoteJudge:
    return RemoteJudge(url, "judge", **({"pause": 0.01, "timeout": 120.0} | options))


def _prefers_good(body: dict[str, Any], number: int) -> str:
    text = body["messages"][1]["content"]
    first = text.partition("<answer_A>\n")[2].partition("\n")[0]
    return "It is better.\n[[A]]" if first == "good" else "It is better.\n[[B]]"


def test_a_judge_that_sees_both_orders_is_believed(serve):
    server = serve(_prefers_good)

    found = compare_verdicts("judge", "m@v1", _judge(server.url, key="secret")(RECORDS, GOOD, BAD))

    assert (found.wins, found.ties, found.losses, found.failed) == (8, 0, 0, {})
    assert found.win_rate.value == 1.0
    assert found.consistency == 1.0
    assert found.p == pytest.approx(2 / 2**8)
    assert len(server.bodies) == 16
    assert set(server.keys) == {"Bearer secret"}


def test_the_win_rate_is_told_for_each_part_of_the_data():
    rows = np.array([1.0, 0.0, 0.5, np.nan])
    parts = {"language": {"en": np.array([0, 2]), "zh": np.array([1]), "de": np.array([3])}}

    found = compare_verdicts("judge", "m@v1", Verdicts(rows), groups=parts)

    told = {value: (rate.value, rate.n) for value, rate in found.slices["language"].items()}
    assert told == {"en": (0.75, 2), "zh": (0.0, 1)}


def test_a_judge_that_follows_the_position_makes_ties(serve):
    server = serve(lambda body, number: "[[A]]")

    found = compare_verdicts("judge", "m@v1", _judge(server.url)(RECORDS, GOOD, BAD))

    assert (found.wins, found.ties, found.losses) == (0, 8, 0)
    assert found.consistency == 0.0
    assert found.p == 1.0


def test_nonsense_is_retried_counted_and_never_scored(serve):
    server = serve(lambda body, number: "Both are lovely.")

    verdicts = _judge(server.url, tries=3)(RECORDS, GOOD, BAD)

    assert np.isnan(verdicts.rows).all()
    assert verdicts.failed == {"no verdict in its answer": 8}
    assert verdicts.retries == 16
    assert compare_verdicts("judge", "m@v1", verdicts).win_rate is None


def test_a_judge_that_comes_to_its_senses_is_heard(serve):
    server = serve(lambda body, number: "Hm." if body["seed"] == 0 else _prefers_good(body, number))

    verdicts = _judge(server.url)(RECORDS, GOOD, BAD)

    assert (verdicts.rows == 1).all()
    assert verdicts.retries == 16


@pytest.mark.parametrize("answer", [{"choices": []}, None, 3])
def test_answers_of_another_shape_are_no_verdicts(serve, answer):
    server = serve(lambda body, number: answer)

    verdicts = _judge(server.url, tries=2)(RECORDS[:2], GOOD[:2], BAD[:2])

    assert verdicts.failed == {"no verdict in its answer": 2}


def test_an_overloaded_judge_is_waited_for_as_long_as_it_asks(serve):
    server = serve(lambda body, number: (429, {"Retry-After": "0.3"}) if number == 1 else _prefers_good(body, number))
    started = time.monotonic()

    verdicts = _judge(server.url, workers=1)(RECORDS[:1], GOOD[:1], BAD[:1])

    assert time.monotonic() - started >= 0.3
    assert (verdicts.rows.tolist(), verdicts.retries) == ([1.0], 1)


@pytest.mark.parametrize("header", ["nan", "inf", "-3", "soon", "Mon, 30 Nov 2020 12:00:00 GMT"])
def test_a_retry_after_that_says_nothing_is_a_usual_pause(serve, monkeypatch, header):
    pauses: list[float] = []
    monkeypatch.setattr(remote_judge.time, "sleep", pauses.append)
    server = serve(lambda body, number: (429, {"Retry-After": header}) if number < 3 else _prefers_good(body, number))

    verdicts = _judge(server.url, workers=1)(RECORDS[:1], GOOD[:1], BAD[:1])

    assert (verdicts.rows.tolist(), verdicts.retries) == ([1.0], 2)
    assert all(0 < pause < 0.1 for pause in pauses)


def test_a_retry_after_of_years_is_a_long_pause_at_most(serve, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(remote_judge.time, "sleep", pauses.append)
    far = ["1e9", "9" * 300, "Mon, 30 Nov 2099 12:00:00 GMT"]
    server = serve(lambda body, number: (503, {"Retry-After": far.pop()}) if far else _prefers_good(body, number))

    assert _judge(server.url, workers=1)(RECORDS[:1], GOOD[:1], BAD[:1]).rows.tolist() == [1.0]
    assert pauses == [30.0] * 3


def test_errors_of_the_server_are_retried_and_refusals_are_not(serve):
    broken, locked = serve(lambda body, number: (500, {})), serve(lambda body, number: (401, {}))

    assert _judge(broken.url, tries=2)(RECORDS[:2], GOOD[:2], BAD[:2]).failed == {"HTTP 500": 2}
    assert len(broken.bodies) == 4
    assert _judge(locked.url)(RECORDS[:2], GOOD[:2], BAD[:2]).failed == {"HTTP 401": 2}
    assert len(locked.bodies) == 2


def test_a_judge_that_hangs_times_out(serve):
    over = threading.Event()
    server = serve(lambda body, number: over.wait() and "[[A]]")

    verdicts = _judge(server.url, timeout=0.3, tries=2)(RECORDS[:2], GOOD[:2], BAD[:2])
    over.set()

    assert verdicts.failed == {"judge timed out": 2}
    assert np.isnan(verdicts.rows).all()


def test_a_judge_that_is_down_is_soon_given_up(serve):
    many = [Record(prompt=[user("?")])] * 200
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody else takes the port, and nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"

        verdicts = _judge(url, tries=2)(many, ["good"] * 200, ["bad"] * 200)

    assert verdicts.failed == {"judge unreachable": 200}
    assert verdicts.retries < 40


def test_verdicts_of_an_earlier_try_are_not_asked_for_again(serve, tmp_path, capsys):
    server = serve(lambda body, number: "Hm." if "question 5" in str(body) else _prefers_good(body, number))

    first = _judge(server.url, tries=1, store=JsonlStore(tmp_path / "verdicts.jsonl"))(RECORDS, GOOD, BAD)
    server.bodies.clear()
    again = _judge(server.url, tries=1, store=JsonlStore(tmp_path / "verdicts.jsonl"))(RECORDS, GOOD, BAD)

    assert np.array_equal(again.rows, first.rows, equal_nan=True)
    assert (again.failed, again.asked_twice) == ({"no verdict in its answer": 1}, 7)
    assert [("question 5" in str(body)) for body in server.bodies] == [True]
    assert "14 verdicts of judge judge are reused from an interrupted evaluation" in capsys.readouterr().err
    another = RemoteJudge(server.url, "other", tries=1, store=JsonlStore(tmp_path / "verdicts.jsonl"))
    assert another(RECORDS[:1], GOOD[:1], BAD[:1]).rows.tolist() == [1.0]
    assert len(server.bodies) == 3


def test_what_a_server_says_against_a_question_is_told(serve):
    server = serve(lambda body, number: (404, {}))
    server.complaint = {"message": "no model judge"}

    assert _judge(server.url)(RECORDS[:1], GOOD[:1], BAD[:1]).failed == {"HTTP 404 ('no model judge')": 1}


def test_equal_answers_tie_unasked_and_missing_ones_are_counted(serve):
    server = serve(_prefers_good)

    verdicts = _judge(server.url)(RECORDS[:3], ["same", None, "good"], ["same", "bad", "bad"])

    assert verdicts.rows[[0, 2]].tolist() == [0.5, 1.0]
    assert verdicts.failed == {"no completion to judge": 1}
    assert len(server.bodies) == 2


def test_the_only_model_is_asked_and_several_must_be_chosen_from(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    assert judge_at(serve(_prefers_good).url, None, 120).model == "judge"
    assert judge_at(serve(_prefers_good, ["m@v1", "m@latest", "m"]).url, None, 120).model == "m@v1"
    with pytest.raises(UsageError, match=r"has 2 models .a, b.; give --judge_model"):
        judge_at(serve(_prefers_good, ["a", "b"]).url, None, 120)
    with pytest.raises(MachineError, match="does not list its models"):
        judge_at("http://127.0.0.1:9/v1", None, 120)
    with pytest.raises(UsageError, match="a URL that begins with http"):
        judge_at("nonsense", None, 120)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"),
        ("x [[b]]", "B"),
        ("[[A]] no\n[[tie]]", "tie"),
        ("A", None),
        ("", None),
        ("[[C]]", None),
        ("[[A]] no, [[tie]]", None),
        ("I end with [[A]], [[B]] or [[tie]].", None),
        ("[[A]]\n\nFor [[A]] is right.", "A"),
    ],
)
def test_a_verdict_is_read_where_it_is_clear(text, verdict):
    assert read_verdict(text) == verdict
