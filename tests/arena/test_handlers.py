"""What handlers of the page say, and when, without a browser."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from functools import partial

import pytest
from browsing import FIRST, SECOND, TIMEOUT
from fake_engine import FakeEngine

from align.arena.battles import Arena, Contestant, Setup
from align.arena.votes import VoteStore
from align.engine.protocol import Sampling

SETTINGS = [1.0, 1.0, 0, 0.0, 1.0, 1000, 0]


@pytest.fixture
def page(tmp_path):
    """The handlers of a blind page, its parts only names, over an engine that talks until it is stopped."""
    pytest.importorskip("gradio")
    from align.arena.battle_panel import BattlePanel
    from align.arena.handlers import PanelHandlers, PromptHandlers, update_controls
    from align.arena.prompt_controls import PromptControls

    setup = Setup((Contestant(FIRST), Contestant(SECOND)), blind=True)
    arena = Arena(FakeEngine([FIRST, SECOND], lambda row: "word " * 100_000, 0.01), setup, VoteStore(tmp_path))
    lists = {"panes": ["pane a", "pane b"], "boxes": ["box a", "box b"], "votes": {"a": "vote a"}, "name_parts": {}}
    panel = BattlePanel(**{part.name: lists.get(part.name, part.name) for part in fields(BattlePanel)})
    controls = PromptControls(**{part.name: part.name for part in fields(PromptControls)})
    judging = PanelHandlers(arena, arena.engine, panel, partial(update_controls, controls))
    return arena, judging, PromptHandlers(arena, judging, controls, Sampling())


def test_what_an_early_vote_shows_comes_after_the_last_drawing_of_the_answers_it_stopped(page, monkeypatch):
    arena, judging, controls = page
    monkeypatch.setattr("align.arena.handlers.SETTLE_SECONDS", TIMEOUT / 1000)
    battle = arena.new_battle()

    async def visit():
        drawing = controls.ask("en|visitor", battle, False, "go on", "", *SETTINGS)
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
    assert judging.panel.status in last
    assert "saved" in shown[judging.panel.status]
    assert FIRST in shown[judging.panel.status]
