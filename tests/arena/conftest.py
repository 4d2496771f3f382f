"""A registry with a base and two loud adapters, pages served from it in a thread, and a real browser."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from browsing import without_browser

from align.engine.protocol import Engine, Row, Sampling
from align.registry import Registry, open_registry
from align.schema import Messages, user

PATIENCE = 120_000
"""milliseconds that a machine may be busy with other things"""
BASE_NAME, FIRST, SECOND, TWIN = "granite-base", "crimson-sft", "azure-dpo", "scarlet-copy"
NAMES = (BASE_NAME, FIRST, SECOND, TWIN)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=32)


def commit_base(registry: Registry, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.model.norm.weight.data.mul_(20)  # fresh weights give nearly flat logits, under which all models sound alike
    with registry.stage(BASE_NAME) as staging:
        model.save_pretrained(staging.path)
        tokenizer.save_pretrained(staging.path)
        staging.commit({"stage": "pretrain", "kind": "base"})


def commit_adapter(registry: Registry, name: str, seed: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    from align.models.adapters import digests_of_base, save_adapter

    base = registry.resolve(BASE_NAME)
    set_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.location), lora)
    with registry.stage(name) as staging:
        save_adapter(model, "default", staging.path, base.location)
        parent = {"reference": base.reference, "digest": base.digest}
        digests = {"reference": base.reference, "location": base.location, "digests": digests_of_base(base)}
        staging.commit({"stage": "sft", "kind": "policy", "parents": [parent], "base": digests})


@pytest.fixture(scope="session")
def contest(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = open_registry(tmp_path_factory.mktemp("contest") / "registry")
    commit_base(registry, tiny_base)
    commit_adapter(registry, FIRST, 1)
    commit_adapter(registry, SECOND, 2)
    commit_adapter(registry, TWIN, 1)
    return registry


@pytest.fixture(scope="session")
def engine(contest: Registry) -> Iterator[Engine]:
    from align.engine.local import LocalEngine
    from align.models.adapters import load_models
    from align.models.loading import Precision

    engine = LocalEngine(load_models(contest, list(NAMES), Precision()))
    yield engine
    engine.close()


class Recorder:
    """Passes an application through and keeps every byte it sends to any browser."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sent = b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def keep(message: Any) -> None:
            self.sent += message.get("body", b"")
            await send(message)

        await self.app(scope, receive, keep)


@dataclass
class Site:
    """A page that is being served; what tests before did to it is forgotten when it is asked for again."""

    url: str
    arena: Any
    recorder: Recorder
    seen: int = 0

    def told(self) -> set[str]:
        """The models whose names have left the server."""
        return {name for name in NAMES if name.encode() in self.recorder.sent}

    def rows(self) -> list[dict[str, Any]]:
        """The votes since the site was asked for."""
        return self._every_row()[self.seen :]

    def forget(self) -> Site:
        self.recorder.sent = b""
        self.seen = len(self._every_row())
        return self

    def _every_row(self) -> list[dict[str, Any]]:
        path = self.arena.votes.path
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()


def is_slow(row: Row) -> bool:
    return row.messages[-1]["content"].startswith("slow")


def reply(row: Row) -> str | None:
    """What the fake models say: their own words, the question and the seed; no model's name."""
    voice = {FIRST: "rose", SECOND: "sky"}.get(row.model.partition("@")[0], "stone")
    question = row.messages[-1]["content"]
    if is_slow(row):
        return " ".join([voice, *WORDS * 40])
    if question.startswith("fail") and voice == "rose":
        return None
    return f"{voice} says **{question}** {row.seed}"


def score(messages: Messages) -> float:
    return len(messages[-1]["content"]) / 10


class Slowly:
    """Slow answers become so slow after some words that they do not end before a test has looked at them."""

    def __init__(self) -> None:
        self._asked = 0

    def __call__(self, row: Row, words: int) -> bool:
        self._asked += 1
        return is_slow(row) and words >= 100 and self._asked % 51 != 0


@dataclass
class Sites:
    """Starts pages on free ports, one for each kind of page that tests ask for."""

    contest: Registry
    engine: Callable[[], Engine]
    votes: Path
    running: dict[tuple[Any, ...], tuple[Site, Any, threading.Thread, socket.socket]] = field(default_factory=dict)

    def __call__(
        self,
        names: tuple[str, ...] = (FIRST, SECOND),
        *,
        blind: bool = True,
        real: bool = False,
        seed: Any = 0,
        prompts: tuple[str, ...] = (),
        tokens: int = 32,
    ) -> Site:
        """A page over the real engine, or over a fake one that talks at once (about "slow" things, slowly)."""
        key = (names, blind, real, seed, prompts, tokens)
        if key not in self.running:
            self.running[key] = self._start(*key)
        return self.running[key][0].forget()

    def _start(
        self, names: tuple[str, ...], blind: bool, real: bool, seed: Any, prompts: tuple[str, ...], tokens: int
    ) -> Any:
        from fake_engine import FakeEngine

        from align.arena.app import PageContents, build_app
        from align.arena.battles import Arena, Contestant
        from align.arena.review_queue import Review, ReviewQueue
        from align.arena.votes import VoteStore
        from align.arena.web import make_server, open_port
        from align.compare import make_setup

        sampling = replace(SAMPLING, max_new_tokens=tokens)
        checkpoints = [self.contest.resolve(name) for name in names]
        setup = make_setup(checkpoints, self.contest.resolve(BASE_NAME), blind)
        if real:
            engine: Any = self.engine()
        else:
            models = [checkpoint.reference for checkpoint in checkpoints]
            engine = FakeEngine(models, reply, 0.02, score=score, holds=Slowly())
            setup = replace(setup, reward=Contestant("amber-judge@v1"))
        # A tiny model ends one answer in some dozens at once; from one seed a page writes the same in every run.
        arena = Arena(engine, setup, VoteStore(self.votes), random.Random(0) if real else None)
        queue = None
        if prompts:
            review = Review([[user(prompt)] for prompt in prompts], setup, sampling)
            queue = ReviewQueue(review, self.votes.parent / "reviews", arena.votes)
            queue.generate(engine)
        recorder = Recorder(build_app(PageContents(arena, self.contest, sampling, seed, queue)))
        server = make_server(recorder)
        listener = open_port("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        return Site(f"http://127.0.0.1:{listener.getsockname()[1]}/", arena, recorder), server, thread, listener

    def close(self) -> None:
        for _, server, thread, listener in self.running.values():
            server.should_exit = True
            thread.join(10)
            listener.close()


@pytest.fixture(scope="session")
def serve(contest: Registry, request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Sites]:
    """Serve a page; equal pages are served once for all tests."""
    if importlib.util.find_spec("gradio") is None:
        without_browser("no gradio")
    sites = Sites(contest, lambda: request.getfixturevalue("engine"), tmp_path_factory.mktemp("votes"))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("battles", "compare_tab"):
            patch.setattr(f"align.arena.{module}.SCORE_SECONDS", PATIENCE / 1000)
        yield sites
        sites.close()


FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


# A module's, not the session's: while Playwright runs, its event loop keeps others' tests from running their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        without_browser("no chromium on the PATH, or no playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Window:
    """A page in the browser, with everything it must not do written down."""

    page: Any
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a site; at the end nothing may have gone to another machine or to the error console."""
    windows = []

    def open_site(site: Site, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **options})
        context.set_default_timeout(PATIENCE)
        window = Window(context.new_page())

        def gate(route: Any) -> None:
            if route.request.url.startswith((site.url, "data:", "blob:")):
                route.continue_()
            else:
                window.outside.append(route.request.url)
                route.abort()

        context.route("**/*", gate)
        window.page.on("pageerror", lambda error: window.errors.append(str(error)))
        window.page.on("console", lambda line: window.errors.append(line.text) if line.type == "error" else None)
        window.page.goto(site.url)
        window.page.locator("#ask").wait_for()
        windows.append((context, window))
        return window

    yield open_site
    for context, window in windows:
        outside, errors = list(window.outside), list(window.errors)
        context.close()
        assert (outside, errors) == ([], [])
