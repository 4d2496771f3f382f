"""What handlers of the page say, and when, without a browser."""

from __future__ import annotations

import asyncio

import pytest
from browsing import FIRST, SECOND, TIMEOUT
from fake_engine import FakeEngine

from align.arena.battles import Arena, Contestant, Setup
from align.arena.votes import VoteStore
from align.engine.protocol import Sampling

SETTINGS = [1.0, 1.0, 0, 0.0, 1.0, 1000, 0]


@pytest.fixture
def page(tmp_path):
    """The first tab of a blind page, over an engine that talks until it is stopped, and its arena."""
    pytest.importorskip("gradio")
    import gradio as gr

    from align.arena.compare_tab import CompareTab

    setup = Setup((Contestant(FIRST), Contestant(SECOND)), blind=True)
    arena = Arena(FakeEngine([FIRST, SECOND], lambda row: "word " * 100_000, 0.01), setup, VoteStore(tmp_path))

    async def lay_out() -> CompareTab:
        with gr.Blocks():
            return CompareTab(arena, Sampling(), None, lambda key: key)

    return arena, asyncio.run(
        lay_out()
    )  # gradio makes an event loop of its own, and never closes it, where there is none


def test_what_an_early_vote_shows_comes_after_the_last_drawing_of_the_answers_it_stopped(page, monkeypatch):
    arena, tab = page
    judging = tab.panel
    monkeypatch.setattr("align.arena.battle_panel.SETTLE_SECONDS", TIMEOUT / 1000)
    battle = arena.new_battle()

    async def visit():
        drawing = tab.ask("en|visitor", battle, False, "go on", "", *SETTINGS)
        while not battle.votable:
            await anext(drawing)
        vote = judging.vote_handler("a")
        voting = asyncio.create_task(asyncio.to_thread(vote, "en|visitor", battle, battle.nonce, None, None))
        while battle.phase == "streaming":
            last = await anext(drawing)
        while battle.phase != "voted":
            await asyncio.sleep(0.01)
        # The last drawing is still on its way: it may say that nobody has voted.
        early, _ = await asyncio.wait([voting], timeout=0.5)
        async for changes in drawing:
            last = changes
        return early, last, await voting

    early, last, shown = asyncio.run(visit())

    assert early == set()
    assert judging.status in last
    assert "saved" in shown[judging.status]
    assert FIRST in shown[judging.status]
