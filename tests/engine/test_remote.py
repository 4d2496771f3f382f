"""A remote engine against real HTTP servers: one that answers well, and ones that do not."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from align.engine.protocol import EngineBusy, GenerationRequest, Row, RowDelta, RowDone, RowFailure, Sampling
from align.engine.remote import RemoteEngine
from align.errors import IntegrityError, MachineError, UsageError
from align.schema import user

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

PATIENCE = 120.0
"""seconds that a machine may be busy with other things"""
HELLO = [user("hello")]
FOUR = Sampling(temperature=0.5, max_new_tokens=4)


class Server:
    """A small server of the API. `answer` is asked for the reply to each body; what it saw is kept."""

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.broken_off = threading.Event()
        self.refusals: list[object] = []
        self.word_seconds = 0.0
        self.most_lines: int | None = None
        """how much of every answer is sent; the rest is held back until this is None"""
        self.stream: Callable[[dict], Iterator[str]] = self.words
        self.app = fastapi.FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.write)
        self.app.post("/v1/completions")(self.write)

    async def models(self, request: fastapi.Request) -> dict:
        if request.headers.get("authorization") not in (None, "Bearer key"):
            return fastapi.responses.JSONResponse({"error": {"message": "wrong key"}}, 401)
        return {"object": "list", "data": [{"id": "red"}, {"id": "blue"}]}

    async def write(self, request: fastapi.Request):
        body = await request.json()
        self.seen.append(body)
        if self.refusals:
            status, error, headers = self.refusals.pop(0)
            return fastapi.responses.JSONResponse({"error": error}, status, headers)
        return fastapi.responses.StreamingResponse(self.send(request, body), media_type="text/event-stream")

    async def send(self, request: fastapi.Request, body: dict):
        try:
            for place, line in enumerate(self.stream(body)):
                await asyncio.sleep(self.word_seconds)
                while self.most_lines is not None and place >= self.most_lines:
                    await asyncio.sleep(0.005)
                yield line
        except asyncio.CancelledError:
            self.broken_off.set()
            raise

    @staticmethod
    def words(body: dict) -> Iterator[str]:
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        said = [f"{body['model']} ", f"{body['seed']} ", "说", f" {prompt}"][: body["max_tokens"]]
        yield ": a comment\n\n"
        for word in said:
            choice = {"delta": {"content": word}} if chat else {"text": word}
            if chat and body.get("logprobs"):
                top = [{"token": word, "logprob": -0.5}, {"token": "x", "logprob": -1.5}][: body["top_logprobs"]]
                choice["logprobs"] = {"content": [{"token": word, "logprob": -0.5, "top_logprobs": top}]}
            elif body.get("logprobs"):
                tops = [{"x": -1.5, word: -0.5}]
                choice["logprobs"] = {"tokens": [word], "token_logprobs": [-0.5], "top_logprobs": tops}
            yield sse({"choices": [choice]})
        yield sse({"choices": [{"delta": {}, "finish_reason": "length" if body["max_tokens"] < 4 else "stop"}]})
        yield sse({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(said)}})
        yield "data: [DONE]\n\n"


def sse(chunk: dict) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@contextmanager
def serving(app) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    server.force_exit = True
    thread.join()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Server, str]]:
    server = Server()
    with serving(server.app) as url:
        yield server, url


@pytest.fixture
def server(running) -> Server:
    server, _ = running
    server.seen.clear()
    server.refusals.clear()
    server.broken_off.clear()
    server.stream, server.word_seconds, server.most_lines = server.words, 0.0, None
    return server


@pytest.fixture
def engine(running) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(running[1], timeout=PATIENCE, patience=PATIENCE)
    yield engine
    engine.close()


def done(stream) -> list[RowDone | RowFailure]:
    return sorted((event for event in stream if not isinstance(event, RowDelta)), key=lambda event: event.row)


def test_rows_stream_from_the_server_with_their_own_models_seeds_and_sampling(server, engine):
    rows = (Row("red", HELLO, 3), Row("blue", HELLO, 4, Sampling(max_new_tokens=2)))

    events = list(engine.submit(GenerationRequest(rows, FOUR)))

    first, second = done(events)
    assert engine.models == ["red", "blue"]
    assert (first.text, first.reason, first.prompt_tokens, first.completion_tokens) == ("red 3 说 hello", "stop", 7, 4)
    assert (second.text, second.reason, second.completion_tokens) == ("blue 4 ", "length", 2)
    assert "".join(event.text for event in events if isinstance(event, RowDelta) and event.row == 0) == first.text
    assert 0 < first.first_token_seconds <= first.seconds
    assert engine.waiting == 0


def test_a_closed_engine_leaves_nothing_unfinished_behind(running, server, caplog):
    lines = list(server.words({"model": "red", "seed": 0, "max_tokens": 4, "messages": HELLO}))
    server.stream, server.most_lines = lambda _body: iter([*lines, ": more\n\n"]), len(lines)
    engine = RemoteEngine(running[1])
    engine.complete([Row("red", HELLO)], FOUR)

    engine.close()
    server.most_lines = None
    del engine
    gc.collect()

    # asyncio tells of tasks that were pending when their loop ended, on the terminal of whoever asked.
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def test_what_is_asked_is_what_the_row_says_and_nothing_more(server, engine):
    full = Sampling(0.5, 0.9, 9, top_k=3, min_p=0.1, repetition_penalty=1.1, frequency_penalty=0.2, stop=("END",))
    engine.complete([Row("red", HELLO, 3)], FOUR)
    engine.complete([Row("red", [], 3, full, text="once")], FOUR)

    plain, rich = server.seen
    assert plain == {
        "model": "red",
        "seed": 3,
        "temperature": 0.5,
        "top_p": 1.0,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": HELLO,
    }
    extras = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "stop": ["END"]}
    assert rich.items() >= (extras | {"prompt": "once", "top_p": 0.9}).items()
    assert "messages" not in rich


@pytest.mark.parametrize("row", [Row("red", HELLO, logprobs=2), Row("red", [], text="hello", logprobs=2)])
def test_log_probs_come_with_their_text(server, engine, row):
    events = list(engine.submit(GenerationRequest((row,), FOUR)))

    tokens = [token for event in events if isinstance(event, RowDelta) for token in event.tokens]
    assert "".join(token.text for token in tokens) == events[-1].text
    assert {token.logprob for token in tokens} == {-0.5}
    assert [each[:2] for each in tokens[0].top] == [("red ", -0.5), ("x", -1.5)]


def test_a_cancelled_row_lets_go_of_the_server(server, engine):
    server.most_lines = 2  # a comment and the first word
    stream = engine.submit(GenerationRequest((Row("red", HELLO), Row("blue", HELLO)), FOUR))
    for event in stream:
        if event.row == 0:
            stream.cancel(0)
            break
    assert server.broken_off.wait(PATIENCE)
    server.most_lines = None

    first, second = done(stream)

    assert first.reason == "cancelled"
    assert first.text == "red "
    assert second.text == "blue 0 说 hello"


def test_a_row_cancelled_before_it_was_asked_for_ends_too(server, engine):
    stream = engine.submit(GenerationRequest((Row("red", HELLO), Row("blue", HELLO)), FOUR))
    stream.cancel()

    assert [event.reason for event in done(stream)] == ["cancelled", "cancelled"]


def test_closing_ends_what_runs_and_what_comes_later(server, engine):
    server.most_lines = 0
    stream = engine.submit(GenerationRequest((Row("red", HELLO),), FOUR))
    while not server.seen:
        time.sleep(0.01)

    assert engine.waiting == 1
    engine.close()
    engine.close()
    later = engine.submit(GenerationRequest((Row("red", HELLO),), FOUR))

    assert "closed" in done(stream)[0].message
    assert "closed" in done(later)[0].message


def test_a_busy_server_is_asked_again_when_it_says_and_meanwhile_submit_is_refused(server, engine, monkeypatch):
    resting, rested, plain = threading.Event(), threading.Event(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds != 77:
            return await plain(seconds)
        resting.set()
        while not rested.is_set():
            await plain(0.005)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    server.refusals = [(429, {"message": "queue full"}, {"Retry-After": "77"})]
    stream = engine.submit(GenerationRequest((Row("red", HELLO),), FOUR))
    assert resting.wait(PATIENCE)

    with pytest.raises(EngineBusy, match="busy") as refused:
        engine.submit(GenerationRequest((Row("red", HELLO),), FOUR))

    assert 0 < refused.value.retry_after <= 77
    rested.set()
    assert done(stream)[0].text == "red 0 说 hello"
    assert len(server.seen) == 2


@pytest.mark.parametrize("header", ["nan", "inf", "-3", "soon", "Mon, 30 Nov 2020 12:00:00 GMT"])
def test_a_retry_after_that_says_nothing_is_a_short_wait(server, engine, monkeypatch, header):
    waits, plain = [], asyncio.sleep

    async def sleep(seconds: float) -> None:
        if threading.current_thread().name != "align-remote":  # the server's own
            return await plain(seconds)
        waits.append(seconds)
        await plain(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    server.refusals = [(429, {"message": "queue full"}, {"Retry-After": header})]

    assert done(engine.submit(GenerationRequest((Row("red", HELLO),), FOUR)))[0].text == "red 0 说 hello"
    assert waits == [0.1 if "GMT" in header else 1.0]


@pytest.mark.parametrize("header", ["1000", "1e9", "9" * 300, "Mon, 30 Nov 2099 12:00:00 GMT"])
def test_patience_ends(server, engine, header):
    server.refusals = [(429, {"message": "queue full"}, {"Retry-After": header})]

    [event] = done(engine.submit(GenerationRequest((Row("red", HELLO),), FOUR)))

    assert "is busy (429: queue full)" in event.message


@pytest.mark.parametrize(
    ("refusal", "fault", "said"),
    [
        ((400, {"message": "too long", "code": "context_length_exceeded"}, None), "too_long", "too long"),
        ((422, {"message": "what is this"}, None), "prompt", "what is this"),
        ((401, {"message": "no key"}, None), "engine", "give the server's own as api_key"),
        ((404, {"message": "no model"}, None), "engine", "one of its models"),
        ((500, "plain words", None), "engine", "500: plain words"),
    ],
)
def test_an_error_answer_fails_its_row_and_says_what_to_do(server, engine, refusal, fault, said):
    server.refusals = [refusal]

    [event] = done(engine.submit(GenerationRequest((Row("red", HELLO),), FOUR)))

    assert isinstance(event, RowFailure)
    assert event.fault == fault
    assert said in event.message
    assert event.message.startswith("red: ")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [sse({"choices": [{"delta": {"content": "a"}}]}), sse({"error": {"message": "out of memory"}})],
            "out of memory",
        ),
        ([sse({"choices": [{"delta": {"content": "a"}}]})], "broke off"),
        (["data: {not json}\n\n"], "another language"),
        (["data: [1]\n\n"], "another language"),
    ],
)
def test_an_answer_that_goes_wrong_half_way_fails_its_row(server, engine, lines, said):
    server.stream = lambda body: iter(lines)

    with pytest.raises(IntegrityError, match=said):
        engine.complete([Row("red", HELLO)], FOUR)


def test_a_server_that_says_nothing_is_given_up(server, running):
    server.most_lines = 0
    engine = RemoteEngine(running[1] + "/v1/", models=["red"], timeout=1.0)

    [event] = done(engine.submit(GenerationRequest((Row("red", HELLO),), FOUR)))
    engine.close()

    assert "said nothing" in event.message


def test_an_unknown_model_is_not_asked_for(server, engine):
    [event] = done(engine.submit(GenerationRequest((Row("rod", HELLO),), FOUR)))

    assert "did you mean red?" in event.message
    assert not server.seen


def test_more_rows_than_may_run_at_once_all_come_back(server, running):
    server.word_seconds = 0.01
    engine = RemoteEngine(running[1], max_rows=4)

    texts = engine.complete([Row("red", HELLO, seed) for seed in range(30)], FOUR)
    engine.close()

    assert texts == [f"red {seed} 说 hello" for seed in range(30)]


def test_a_server_that_is_not_there_or_is_something_else_is_told(running):
    with pytest.raises(MachineError, match="cannot be reached"):
        RemoteEngine("http://127.0.0.1:9")
    with pytest.raises(MachineError, match="refused the key"):
        RemoteEngine(running[1], api_key="wrong")
    with pytest.raises(MachineError, match="up to /v1"):
        RemoteEngine(f"{running[1]}/elsewhere")
    with pytest.raises(UsageError, match="not an address"):
        RemoteEngine("localhost:8000")


def test_the_right_key_opens(running):
    engine = RemoteEngine(running[1], api_key="key")
    engine.close()

    assert engine.models == ["red", "blue"]


def test_questions_the_api_does_not_know(engine):
    with pytest.raises(UsageError, match="does not tell"):
        engine.token_shift("red", HELLO)
    assert engine.reward_score(HELLO) is None


def test_a_remote_engine_needs_no_torch():
    script = "import sys, align.engine.remote; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=PATIENCE).returncode == 0


def test_generate_asks_a_server(server, running, capsys, monkeypatch):
    from align import generate

    monkeypatch.setenv("ALIGN_TOKEN", "key")

    assert generate.main(["blue", "hello", "--url", running[1], "--seed", "3", "--max_new_tokens", "9"]) == 0
    assert capsys.readouterr().out == "blue 3 说 hello\n"
    assert generate.main(["blew", "hello", "--url", running[1]]) == 2
    assert "did you mean blue?" in capsys.readouterr().err


def test_through_this_projects_own_server_a_row_is_what_it_is_here(engine_here):
    from align.server.application import create_app
    from align.server.limits import ServerLimits
    from align.server.served_models import ServedModel, ServedModels

    models = ServedModels([ServedModel(name, (name,), "base@v1") for name in engine_here.models])
    hot = Sampling(1.0, 0.9, 20, top_k=50, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, stop=("e",))
    rows = [Row(model, HELLO, seed, hot) for model in engine_here.models for seed in range(3)]
    rows += [Row("red@v1", [], 5, text="the quick", logprobs=2), Row("blue@v1", HELLO, 6, logprobs=3)]
    with serving(create_app(engine_here, models, ServerLimits(), None)) as url:
        far = RemoteEngine(url)
        events = list(far.submit(GenerationRequest(tuple(rows), FOUR)))
        far.close()
    here = list(engine_here.submit(GenerationRequest(tuple(rows), FOUR)))

    assert [event.text for event in done(events)] == [event.text for event in done(here)]
    assert [event.completion_tokens for event in done(events)] == [event.completion_tokens for event in done(here)]
    for row in (9, 10):
        ours, theirs = (
            [token for event in found if isinstance(event, RowDelta) and event.row == row for token in event.tokens]
            for found in (here, events)
        )
        assert [token.logprob for token in theirs] == pytest.approx([token.logprob for token in ours], abs=1e-4)
        assert [token.text for token in theirs] == [token.text for token in ours]


@pytest.fixture
def engine_here(tiny_base):
    from loud_models import build_loaded_base

    from align.engine.local import LocalEngine

    engine = LocalEngine(build_loaded_base(tiny_base))
    yield engine
    engine.close()
