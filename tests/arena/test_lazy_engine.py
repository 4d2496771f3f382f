"""A page whose review is written opens without any model; one is loaded when something is asked of it."""

from __future__ import annotations

import json
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from browsing import BASE, FIRST, SECOND, TIMEOUT, ask, leave_the_prompt
from fake_engine import FakeEngine

from align import compare
from align.arena.review_queue import Review, ReviewQueue
from align.arena.votes import VoteStore, read_votes
from align.compare import LazyEngine
from align.engine.protocol import GenerationRequest, Row, RowFailure, Sampling
from align.errors import MachineError
from align.registry import Registry, open_registry
from align.schema import user

GREEDY = Sampling(temperature=0.0)


def make_request(rows: int = 1) -> GenerationRequest:
    return GenerationRequest(tuple(Row("red", [user(f"Question {row}")]) for row in range(rows)), GREEDY)


def make_engine() -> FakeEngine:
    return FakeEngine(["red"], lambda row: f"Reply to {row.messages[-1]['content']}", score=lambda talk: len(talk))


def texts(events) -> list[str]:
    return [event.text for event in events if hasattr(event, "reason")]


def test_an_engine_is_loaded_once_however_many_ask_at_once():
    go, loads = threading.Event(), []

    def load() -> FakeEngine:
        loads.append(go.wait(60))
        return make_engine()

    engine = LazyEngine(["red"], load)
    assert (engine.models, engine.waiting, loads) == (["red"], 0, [])
    handles = [engine.submit(make_request(2)) for _ in range(3)]
    go.set()

    assert [sorted(texts(handle)) for handle in handles] == [["Reply to Question 0", "Reply to Question 1"]] * 3
    assert engine.complete([Row("red", [user("more")])], GREEDY) == ["Reply to more"]
    assert engine.reward_score([user("one")]) == 1
    assert len(engine.token_shift("red", [user("one"), {"role": "assistant", "content": "two words"}])) == 3
    assert len(loads) == 1
    engine.close()


def test_what_is_cancelled_before_the_engine_is_there_is_not_written():
    go = threading.Event()
    slow = FakeEngine(["red"], lambda row: "word " * 1000, seconds_per_word=0.05)
    engine = LazyEngine(["red"], lambda: slow if go.wait(60) else pytest.fail("never let go"))
    handle = engine.submit(make_request(2))

    handle.cancel()
    go.set()

    assert [event.reason for event in handle if hasattr(event, "reason")] == ["cancelled"] * 2


def test_an_engine_that_cannot_be_loaded_is_told_in_every_row_and_tried_again():
    attempts = iter([MachineError("no memory"), ValueError("a bug"), None])

    def load() -> FakeEngine:
        if error := next(attempts):
            raise error
        return make_engine()

    engine = LazyEngine(["red"], load)

    for cause in ("no memory", "a bug"):
        events = list(engine.submit(make_request(2)))
        assert [type(event) for event in events] == [RowFailure] * 2
        assert all(cause in event.message for event in events)
    assert texts(engine.submit(make_request())) == ["Reply to Question 0"]


def test_an_engine_nobody_asked_is_closed_without_being_loaded():
    LazyEngine(["red"], lambda: pytest.fail("loaded")).close()


PROMPTS = ("first question", "second question")


@pytest.fixture
def reviewed(contest: Registry, tmp_path) -> Registry:
    """A registry with a review of PROMPTS of which every answer is written."""
    shutil.copytree(contest.root, tmp_path / "registry", ignore=shutil.ignore_patterns("votes", "reviews"))
    registry = open_registry(tmp_path / "registry")
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    setup = compare.make_setup([registry.resolve(name) for name in (FIRST, SECOND)], registry.resolve(BASE), True)
    review = Review([[user(prompt)] for prompt in PROMPTS], setup, Sampling(max_new_tokens=8), name="asked")
    queue = ReviewQueue(review, registry.reviews_dir, VoteStore(registry.votes_dir))
    queue.generate(FakeEngine([one.reference for one in setup.contestants], lambda row: f"Reply {row.seed}"))
    return registry


def command(registry: Registry) -> list[str]:
    prompts = registry.root.parent / "asked.jsonl"
    chosen = [FIRST, SECOND, "--blind", "--port", "0", "--prompts", str(prompts), "--max_new_tokens", "8"]
    return [*chosen, "--registry", str(registry.root)]


SAYS_WHEN_IT_LOADS = """
import sys
from align import compare
from align.models import adapters

load = adapters.load_models
adapters.load_models = lambda *asked: print("models load", flush=True) or load(*asked)
sys.exit(compare.main(sys.argv[1:]))
"""


@pytest.fixture
def page_of_its_own(reviewed: Registry) -> Iterator[subprocess.Popen[bytes]]:
    """`align.compare` on the written review, in a process of its own."""
    asked = [sys.executable, "-c", SAYS_WHEN_IT_LOADS, *command(reviewed)]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, bufsize=0) as process:
        yield process
        process.send_signal(signal.SIGINT)
        process.wait(300)


def test_a_page_whose_review_is_written_opens_without_any_model(reviewed: Registry, monkeypatch, capsys):
    pytest.importorskip("gradio")
    from align.arena import app, web
    from align.models import adapters

    opened = []
    monkeypatch.setattr(adapters, "load_models", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(app, "build_app", opened.append)
    monkeypatch.setattr(web, "make_server", lambda app: SimpleNamespace(run=lambda sockets: None))

    assert compare.main(command(reviewed)) == 0

    assert opened[0].queue.progress("ann") == (0, 2)
    told = capsys.readouterr().out
    assert ": 4 of 4 answers are there, so no model is loaded until a question needs one\n" in told


@pytest.mark.slow
@pytest.mark.browser
def test_a_written_review_is_judged_without_any_model_until_one_is_asked(page_of_its_own, reviewed, visit: Callable):
    lines = [page_of_its_own.stdout.readline().decode() for _ in range(2)]
    assert "so no model is loaded" in lines[0]
    page = visit(SimpleNamespace(url=re.search(r"http://[^ ]+", lines[1])[0] + "/")).page
    page.locator("#tab-review-button").click()
    page.locator("#review-status .answered").wait_for()
    page.locator("#review-vote-a:not([disabled])").wait_for()
    leave_the_prompt(page)
    page.keyboard.press("1")
    page.locator("#review-status .saved").wait_for()

    assert [row["choice"] for row in read_votes(reviewed.votes_dir)] == ["a"]
    assert select.select([page_of_its_own.stdout], [], [], 0)[0] == []
    page.locator("[role=tab]").first.click()
    ask(page, "the quick brown fox", wait=False)
    # Nothing leaves the browser while this thread waits for anything but the browser.
    page.locator("#status .streaming").wait_for()
    page.locator("#status .answered").wait_for(timeout=3 * TIMEOUT)
    assert page_of_its_own.stdout.readline() == b"models load\n"
    assert all(page.locator(f"#pane-{pane} .bot").inner_text() for pane in "ab")
