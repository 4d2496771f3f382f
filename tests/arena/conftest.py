"""A registry with a base and two loud adapters, pages served from it in a thread, and a real browser."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from align.engine.protocol import Engine, Sampling
from align.registry import Registry, open_registry

BASE_NAME, FIRST, SECOND = "granite-base", "crimson-sft", "azure-dpo"
NAMES = (BASE_NAME, FIRST, SECOND)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=120)


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
    return registry


@pytest.fixture(scope="session")
def engine(contest: Registry) -> Iterator[Engine]:
    from align.engine.local import LocalEngine
    from align.models.adapters import load_resident
    from align.models.loading import Precision

    engine = LocalEngine(load_resident(contest, list(NAMES), Precision()))
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
    url: str
    votes: Path
    arena: Any
    recorder: Recorder

    def told(self) -> set[str]:
        """The models whose names have left the server."""
        return {name for name in NAMES if name.encode() in self.recorder.sent}

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.votes.read_text().splitlines()] if self.votes.exists() else []


@pytest.fixture
def serve(contest: Registry, engine: Engine, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Serve a page over the real engine, or another one, on a free port."""
    pytest.importorskip("gradio")
    from align.arena.battles import Arena
    from align.arena.votes import VoteStore
    from align.arena.web import make_server, open_port
    from align.compare import describe

    running = []

    def start(names: tuple[str, ...] = (FIRST, SECOND), *, blind: bool = True, speaker: Any = None, seed: Any = 0):
        from align.arena.app import build_app

        checkpoints = [contest.resolve(name) for name in names]
        setup = describe(checkpoints, contest.resolve(BASE_NAME), blind)
        arena = Arena(speaker or engine, setup, VoteStore(tmp_path / "votes"))
        recorder = Recorder(build_app(arena, SAMPLING, seed))
        server = make_server(recorder)
        listener = open_port("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread, listener))
        return Site(f"http://127.0.0.1:{listener.getsockname()[1]}/", arena.votes.path, arena, recorder)

    yield start
    for server, thread, listener in running:
        server.should_exit = True
        thread.join(10)
        listener.close()


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
    """Debian's Chromium; without one these tests are skipped, or fail where ALIGN_REQUIRE_BROWSER=1."""
    chromium = shutil.which("chromium")
    required = os.environ.get("ALIGN_REQUIRE_BROWSER") == "1"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        reason = "no chromium on the PATH, or no playwright"
        pytest.fail(reason) if required else pytest.skip(reason)
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
        window.page.locator("#ask").wait_for(timeout=30_000)
        windows.append((context, window))
        return window

    yield open_site
    for context, window in windows:
        outside, errors = list(window.outside), list(window.errors)
        context.close()
        assert (outside, errors) == ([], [])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
