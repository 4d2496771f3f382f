"""The comparison page in a real browser over a real engine with adapters on one tiny base."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browsing import FIRST, SECOND, TWIN, answered, ask, growing, saved, set_field, vote

from align.engine.protocol import Row, RowDone, Sampling

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


def test_equal_models_at_one_seed_write_equal_text_in_both_panes(serve, visit):
    site = serve((FIRST, TWIN), real=True)
    page = visit(site).page

    ask(page, "the quick brown fox")
    vote(page, "tie")

    [row] = site.rows()
    assert row["a"] == row["b"]
    solo = Row(f"{FIRST}@v1", row["prompt"], row["seed"])
    sampling = Sampling(temperature=1.0, max_new_tokens=32)
    assert site.arena.engine.complete([solo], sampling) == [row["a"][0]["content"]]


def test_both_panes_grow_together_and_stop_leaves_what_can_be_judged(serve, visit, gate):
    gate.close(after=40, seconds=0.2)
    site = serve(real=True, tokens=1000)
    page = visit(site).page
    ask(page, "the quick brown fox", wait=False)
    growing(page)
    page.locator("#status .streaming").wait_for()

    page.keyboard.press("Escape")
    answered(page)

    vote(page, "b")
    [row] = site.rows()
    assert row["truncated"]
    assert all(row["turns"][0][side]["tokens"] < 1000 for side in "ab")


def test_closing_the_page_frees_the_engine(serve, visit, gate, monkeypatch):
    gate.close(after=40, seconds=0.2)
    site = serve(real=True, tokens=1000)
    asked, submit = [], site.arena.engine.submit
    monkeypatch.setattr(site.arena.engine, "submit", lambda request: asked.append(submit(request)) or asked[-1])
    window = visit(site)
    ask(window.page, "the quick brown fox", wait=False)
    growing(window.page)

    window.page.close()

    [stream] = asked
    while not stream.is_cancelled(0):
        time.sleep(0.01)
    gate.open()
    # Nobody reads on in the stream, so its last events are still there.
    ends = [event for event in stream if isinstance(event, RowDone)]
    assert all(end.completion_tokens < 1000 for end in ends)
    assert "cancelled" in {end.reason for end in ends}


def test_the_token_shift_of_a_real_answer_is_shown_after_the_vote(serve, visit):
    site = serve(real=True)
    page = visit(site).page
    set_field(page, "max_new_tokens", "12")
    ask(page, "the quick brown fox")
    vote(page, "a")

    page.locator("#shift").click()

    page.locator("#shift-b .tok").first.wait_for()
    [row] = site.rows()
    shown = page.locator("#shift-a .tokens").text_content()
    # HTML has no zero byte: the page leaves out what a random model may well sample.
    assert shown.startswith(row["a"][0]["content"][:20].replace("\0", ""))
    assert page.locator("#shift-a .m1, #shift-a .m2, #shift-a .m3, #shift-a .m4").count() > 0


@pytest.mark.slow
def test_votes_of_the_browser_train_dpo_in_the_next_command(serve, visit, contest):
    site = serve(real=True)
    page = visit(site).page
    set_field(page, "max_new_tokens", "16")
    for question in ("one", "two"):
        ask(page, question)
        page.locator("#vote-a").click()
        saved(page)
        page.wait_for_timeout(1000)
    contest.votes_dir.mkdir(exist_ok=True)
    kept = shutil.copy(site.arena.votes.path, contest.votes_dir)

    settings = ["data=votes", "name=voted-here", "max_steps=2", "per_device_train_batch_size=2"]
    command = [sys.executable, "-m", "align.dpo", f"model={SECOND}", *settings, "--registry", str(contest.root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    os.unlink(kept)  # other tests count the votes of this registry
    assert done.returncode == 0, done.stderr
    [votes] = contest.resolve("voted-here").manifest["data"]
    assert votes["rows"] >= 2
