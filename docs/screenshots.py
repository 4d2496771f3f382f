"""Make the pictures of the comparison page under docs/images, from the models of the quickstart.

    align quickstart --registry DIR
    python docs/screenshots.py --registry DIR

The answers, the token shift and the scores are those of the quickstart's models. The votes behind the leaderboard are
cast by the program that knows the small world's facts; they are kept in a temporary folder, not in the registry.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.arena.app import PageContents, build_app
from align.arena.battles import Arena
from align.arena.review_queue import Review, ReviewQueue
from align.arena.votes import VoteStore
from align.arena.web import make_server, open_port
from align.compare import make_setup
from align.config import write
from align.data import load_records
from align.engine.local import LocalEngine
from align.engine.protocol import Sampling
from align.models.adapters import load_models
from align.models.loading import Precision
from align.registry import Registry, open_registry
from align.schema import Messages
from align.world.judge import judge

MODELS = ["world-base", "world-sft", "world-dpo", "world-ppo"]
REWARD = "world-reward"
SAMPLING = Sampling(temperature=1.0, max_new_tokens=40)
SEED = 5
QUESTION, CHINESE = "What is the return period of the tent?", "请问水壶的保修期有多久？"
IMAGES = Path(__file__).parent / "images"
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]


class Studio:
    """The quickstart's models, loaded once, and the pages served from them."""

    def __init__(self, registry: Registry, votes: Path) -> None:
        self.registry = registry
        self.votes = votes
        self.checkpoints = {name: registry.resolve(name) for name in MODELS}
        self.reward = registry.resolve(REWARD)
        loaded = load_models(registry, [one.reference for one in self.checkpoints.values()], Precision())
        self.base = loaded.base
        self.engine = LocalEngine(loaded, reward=self.reward.reference)

    @contextmanager
    def page(self, names: list[str], *, blind: bool, prompts: list[Messages] | None = None) -> Iterator[str]:
        """The address of a page that compares some models."""
        setup = make_setup([self.checkpoints[name] for name in names], self.base, blind, self.reward)
        store = VoteStore(self.votes)
        queue = None
        if prompts:
            queue = ReviewQueue(Review(prompts, setup, SAMPLING), self.votes.parent / "reviews", store)
            queue.generate(self.engine)
        app = build_app(PageContents(Arena(self.engine, setup, store), self.registry, SAMPLING, SEED, queue))
        server, listener = make_server(app), open_port("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()
        listener.close()

    def vote_by_program(self, prompts: list[Messages]) -> None:
        """Let the program that knows the facts judge every two models on every prompt."""
        setup = make_setup(list(self.checkpoints.values()), self.base, True, self.reward)
        store = VoteStore(self.votes)
        queue = ReviewQueue(Review(prompts, setup, SAMPLING, name="program"), self.votes.parent / "reviews", store)
        queue.generate(self.engine)
        while (battle := queue.next("program")) is not None:
            first, second = (judge(pane.messages[:-1], pane.answer).gold for pane in battle.panes)
            choice = "a" if first > second else "b" if second > first else "tie" if first > 0.5 else "bad"
            queue.vote(battle, choice, battle.nonce)


class Camera:
    """A browser window that is photographed."""

    def __init__(self, browser: Any, url: str, size: dict[str, int], **options: Any) -> None:
        touch = {"is_mobile": True, "has_touch": True} if size is PHONE else {}
        context = browser.new_context(viewport=size, **{"locale": "en-US", **touch, **options})
        self.page = context.new_page()
        self.page.goto(url)
        self.page.locator("#ask").wait_for(timeout=60_000)

    def ask(self, question: str) -> None:
        """Ask, and wait for every answer."""
        self.page.locator("#prompt textarea").fill(question)
        self.page.keyboard.press("Enter")
        self.page.locator("#status .answered").wait_for(timeout=60_000)

    def said(self, pane: str) -> str:
        """The answer in a pane."""
        return str(self.page.locator(f"#pane-{pane} .bot").inner_text())

    def vote(self, choice: str) -> None:
        """Vote, and wait for the names."""
        self.page.locator(f"#vote-{choice}").click()
        self.page.locator("#status .saved").wait_for(timeout=60_000)

    def shift(self) -> None:
        """Show the token shift."""
        self.page.locator("#shift").click()
        self.page.locator("#shift-a .tok").first.wait_for(timeout=60_000)

    def open(self, tab: str, sign: str) -> None:
        """Open a tab, and wait for a part of it."""
        self.page.locator(f"#tab-{tab}-button").click()
        self.page.locator(sign).first.wait_for(timeout=60_000)

    def shoot(self, name: str, *, whole: bool = False) -> None:
        """Keep a picture."""
        self.page.evaluate("document.activeElement.blur()")
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(400)  # until colours have faded in
        self.page.screenshot(path=IMAGES / f"{name}.png", full_page=whole, animations="disabled")
        write(f"{name}.png: {(IMAGES / f'{name}.png').stat().st_size // 1024} kB")


def close(browser: Any) -> None:
    """Close every window."""
    for context in browser.contexts:
        context.close()


def photograph(studio: Studio, browser: Any, prompts: list[Messages]) -> None:
    """All pictures, one page after the other."""
    with studio.page(["world-base", "world-dpo"], blind=True, prompts=prompts[:4]) as url:
        camera = Camera(browser, url, DESK)
        camera.ask(QUESTION)
        camera.shoot("blind-before")
        camera.vote(max("ab", key=lambda pane: judge(QUESTION, camera.said(pane)).gold))
        camera.shoot("blind-after")
        camera.shift()
        camera.page.locator("#panes .tok[class*=' ']").first.hover()  # one whose likelihood changed
        camera.page.wait_for_timeout(200)
        camera.page.screenshot(path=IMAGES / "token-shift.png")
        camera = Camera(browser, url, DESK)
        camera.open("review", "#review-status .answered")
        camera.page.locator("#review-difference").click()
        camera.page.locator("#review-shift-a .tokens").wait_for()
        camera.shoot("review-queue")
        camera = Camera(browser, url, PHONE)
        camera.ask(QUESTION)
        camera.shoot("phone", whole=True)
        close(browser)
    with studio.page(MODELS, blind=False) as url:
        camera = Camera(browser, url, DESK, color_scheme="dark")
        camera.ask(QUESTION)
        camera.shift()
        camera.shoot("dark", whole=True)
        camera = Camera(browser, url, DESK)
        camera.open("leaderboard", "#standings table")
        camera.shoot("leaderboard", whole=True)
        camera.open("models", "#model .tree")
        camera.page.locator("#pick label").nth(2).click()
        camera.page.locator("#model .tree b:has-text('world-dpo')").wait_for()
        camera.shoot("models", whole=True)
        close(browser)
    with studio.page(["world-sft", "world-ppo"], blind=False) as url:
        camera = Camera(browser, url, DESK, locale="zh-CN")
        camera.ask(CHINESE)
        camera.shift()
        camera.shoot("chinese", whole=True)
        close(browser)


def main() -> None:
    """Run the command line."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", metavar="DIR", help="where the quickstart's models are")
    registry = open_registry(parser.parse_args().registry)
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium on the PATH; install it (apt-get install chromium fonts-wqy-microhei)")
    IMAGES.mkdir(exist_ok=True)
    found = load_records("world-prompts-eval", view="prompt", roots={"registry": registry.root})
    prompts = [record.prompt for record in found.records[:12] if record.prompt]
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(registry, Path(folder) / "votes")
        write("models loaded; the program votes")
        studio.vote_by_program(prompts)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            photograph(studio, browser, prompts)
            browser.close()
        studio.engine.close()


if __name__ == "__main__":
    main()
