"""Long prompts, which are read in parts between the steps of the rows that are being written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from loud_models import bare_engine, build_loaded_base
from zoo import ARCHITECTURES, build_zoo_model

from align.engine.local import LocalEngine
from align.engine.protocol import GenerationRequest, Row, RowDelta, RowDone, RowFailure, Sampling
from align.engine.stream import Stream
from align.schema import user

PART = 40
HOT = Sampling(temperature=1.0, max_new_tokens=8)
RUNNING = Row("blue@v1", [user("the quick brown fox")], 3, Sampling(temperature=1.0, max_new_tokens=1500))
LONG = Row("red@v1", [user("fox " * 150)], 1)
SHORT = Row("blue@v1", [user("hello")], 2)


class Watched(NamedTuple):
    """An engine, the (rows, columns) of each of its passes, and what is to be done before the next one of so many."""

    engine: LocalEngine
    shapes: list[tuple[int, int]]
    before: dict[tuple[int, int], Callable[[], None]]
    go_on: Callable[[], None] = lambda: None

    def submit(self, *rows: Row) -> Stream:
        """Hand rows to the engine, which then goes on."""
        stream = self.engine.submit(GenerationRequest(rows, HOT))
        self.go_on()
        return stream


@pytest.fixture(scope="module")
def watched(tiny_base) -> Iterator[Watched]:
    loaded = build_loaded_base(tiny_base)
    engine = LocalEngine(loaded, prefill_chunk_tokens=PART)
    found = Watched(engine, [], {})

    def note(_model, _words, options) -> None:
        shape = tuple(options["input_ids"].shape)
        found.shapes.append(shape)
        found.before.pop(shape, lambda: None)()

    loaded.model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    yield found
    engine.close()


@pytest.fixture
def beside(watched: Watched, gate) -> Iterator[Watched]:
    """The same while a row is being written, which is held until others are submitted."""
    gate.close(after=10)
    watched.shapes.clear()
    running = watched.engine.submit(GenerationRequest((RUNNING,)))
    while len(watched.shapes) <= 10:
        time.sleep(0.005)
    watched.shapes.clear()
    yield watched._replace(go_on=gate.open)
    gate.open()
    running.cancel()
    list(running)


def ends(watched: Watched, *rows: Row) -> list[RowDone | RowFailure]:
    events = (event for event in watched.submit(*rows) if not isinstance(event, RowDelta))
    return sorted(events, key=lambda event: event.row)


def test_others_write_a_token_after_each_part(beside):
    [end] = ends(beside, LONG)

    places = [place for place, (_, columns) in enumerate(beside.shapes) if columns > 1]
    read = [beside.shapes[place] for place in places]
    steps = [beside.shapes[place + 1] for place in places]
    assert end.prompt_tokens > 3 * PART
    assert [columns for _, columns in read[:-1]] == [PART] * (len(read) - 1)
    assert sum(columns for _, columns in read) == end.prompt_tokens
    assert steps == [(1, 1)] * (len(read) - 1) + [(2, 1)]


def test_what_is_read_in_parts_is_answered_as_what_is_read_at_once(beside, engine):
    together = ends(beside, LONG, SHORT)

    # Two prompts share what may be read between two steps.
    assert max(columns for _, columns in beside.shapes) == PART // 2
    assert [end.text for end in together] == engine.complete([LONG, SHORT], HOT)


def test_a_prompt_that_nobody_waits_for_is_read_at_once(watched):
    watched.shapes.clear()

    [end] = ends(watched, LONG)

    assert watched.shapes[0] == (1, end.prompt_tokens)


def test_a_row_stopped_while_its_prompt_is_read_is_off_the_model_with_the_next_step(beside):
    stopped: list[int] = []
    submitted = threading.Event()

    def stop() -> None:
        submitted.wait()
        stream.cancel()
        stopped.append(len(beside.shapes))

    beside.before[1, PART] = stop
    stream = beside.submit(LONG)
    submitted.set()
    [end] = stream

    assert (end.reason, end.completion_tokens) == ("cancelled", 0)
    ends(beside, SHORT)
    assert (1, PART) not in beside.shapes[stopped[0] :]


def test_a_row_stopped_while_its_prompt_is_read_changes_nothing_for_the_one_read_with_it(beside, engine):
    submitted = threading.Event()
    beside.before[2, PART // 2] = lambda: submitted.wait() and stream.cancel(1)
    stream = beside.submit(LONG, SHORT)
    submitted.set()

    events = [event for event in stream if isinstance(event, RowDone)]

    assert [(event.row, event.reason) for event in events] == [(1, "cancelled"), (0, "length")]
    assert events[1].text == engine.complete([LONG], HOT)[0]


def test_a_part_that_fails_ends_the_rows_it_was_of(beside, engine):
    def explode() -> None:
        raise RuntimeError("out of memory, say")

    beside.before[1, PART] = explode

    [failed] = ends(beside, LONG)

    assert isinstance(failed, RowFailure)
    assert "out of memory, say" in failed.message
    assert ends(beside, LONG)[0].text == engine.complete([LONG], HOT)[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_reads_in_parts_what_it_reads_at_once(architecture, tmp_path):
    # The loss of a router is nobody's business here; `load_models` turns it off too.
    folder = build_zoo_model(architecture, tmp_path, output_router_logits=False)
    engine = bare_engine(folder, max_rows=3, prefill_chunk_tokens=7)
    texts = ["a fox", "nine blue eggs", "the lazy dog runs far away from here to there with nine blue eggs"]
    rows = [
        Row("base@v1", [], place, Sampling(1.0, max_new_tokens=4 + 7 * (place % 4)), text=texts[place % 3])
        for place in range(9)
    ]

    together = engine.complete(rows, HOT)

    assert together == [engine.complete([row], HOT)[0] for row in rows]
    engine.close()
