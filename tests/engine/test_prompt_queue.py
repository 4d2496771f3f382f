"""Prompts that are rendered and encoded beside the engine: long ones hold nobody up, and abandoned ones end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from loud_models import build_loaded_base

from align.data.bounded_process import BoundedProcess
from align.engine import prompt_queue
from align.engine.local import LocalEngine
from align.engine.protocol import GenerationRequest, Row, RowDelta, RowDone, RowFailure, Sampling
from align.schema import assistant, user

HOT = Sampling(temperature=1.0, max_new_tokens=6)
RUNNING = Row("blue@v1", [user("the quick brown fox")], 3, Sampling(temperature=1.0, max_new_tokens=1500))
ROWS = [
    Row("red@v1", [user("hello")], 1),
    Row("blue@v1", [], 2, text="the quick"),
    Row("blue@v1", [user("fox"), assistant("dog <|im_end|>"), user("狐狸")], 3),
]
LARGE = Row("red@v1", [user("fox " * 50_000)], 1)
LOOPS = (
    "{% if messages[0].content == 'loop' %}" + "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}"
)


@pytest.fixture(scope="module")
def beside(tiny_base) -> Iterator[LocalEngine]:
    loaded = build_loaded_base(tiny_base)
    loaded.tokenizer.chat_template = LOOPS + loaded.tokenizer.chat_template
    engine = LocalEngine(loaded, max_waiting_rows=50)
    engine.start_prompt_process()
    yield engine
    engine.close()


def ends(engine: LocalEngine, *rows: Row) -> list[RowDone | RowFailure]:
    events = engine.submit(GenerationRequest(rows, HOT))
    return sorted((event for event in events if not isinstance(event, RowDelta)), key=lambda event: event.row)


def test_texts_are_those_of_prompts_encoded_in_the_engine(beside, engine):
    assert beside.complete(ROWS, HOT) == engine.complete(ROWS, HOT)


def test_what_is_wrong_with_a_prompt_is_told_as_before(beside, engine):
    bad = [LARGE, Row("red@v1", [], text=""), Row("red@v1", [])]

    assert ends(beside, *bad) == ends(engine, *bad)


def test_large_prompts_are_encoded_while_others_write_and_after_small_ones(beside):
    running = beside.submit(GenerationRequest((RUNNING,)))
    next(stream := iter(running))

    many = beside.submit(GenerationRequest((LARGE,) * 40, HOT))
    done = beside.submit(GenerationRequest((ROWS[0],), HOT))
    small = [event for event in done if isinstance(event, RowDone)]
    left = len(beside._prompts)
    many.cancel()
    written = isinstance(next(stream), RowDelta)
    running.cancel()

    assert small[0].reason == "length"
    assert written
    assert left > 0
    assert {event.row for event in many} == set(range(40))


@pytest.fixture
def looping(beside, monkeypatch) -> tuple[LocalEngine, threading.Event]:
    """The engine, and an event that tells that the process works on a prompt that never ends."""
    asked = threading.Event()
    ask = BoundedProcess.ask

    def noted(process, request, unwanted=None):
        if b"loop" in request:
            asked.set()
        return ask(process, request, unwanted)

    monkeypatch.setattr(BoundedProcess, "ask", noted)
    return beside, asked


def test_a_prompt_whose_reader_left_ends_and_the_next_one_is_encoded(looping, monkeypatch):
    engine, asked = looping
    monkeypatch.setattr(prompt_queue, "_START_S", 0.0)
    stream = engine.submit(GenerationRequest((Row("red@v1", [user("loop")]),), HOT))
    assert asked.wait(60)

    stream.cancel()

    assert [event.reason for event in stream] == ["cancelled"]
    assert ends(engine, ROWS[0])[0].reason == "length"
    assert engine.waiting == 0


def test_an_engine_ends_while_a_prompt_is_rendered(tiny_base):
    loaded = build_loaded_base(tiny_base)
    loaded.tokenizer.chat_template = LOOPS + loaded.tokenizer.chat_template
    engine = LocalEngine(loaded)
    engine.start_prompt_process()
    streams = [engine.submit(GenerationRequest((Row("red@v1", [user("loop")]), ROWS[0]), HOT)) for _ in range(2)]

    engine.close()

    for stream in streams:
        assert {event.row for event in stream if not isinstance(event, RowDelta)} == {0, 1}
    assert not engine._prompts._thread.is_alive()


@pytest.mark.slow
def test_a_prompt_that_takes_too_long_fails_alone(beside):
    [slow, quick] = ends(beside, Row("red@v1", [user("loop")]), ROWS[0])

    assert (slow.fault, quick.reason) == ("prompt", "length")
    assert "did not end within 10 s of computing; shorten it" in slow.message
