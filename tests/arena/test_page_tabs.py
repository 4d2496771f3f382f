"""What stands beside and below the answers: token shift, review queue, leaderboard, models; and how all of it looks."""

from __future__ import annotations

import json

import pytest
from browsing import BASE, FIRST, MISFITS, SECOND, TIMEOUT, TWIN, ask, hides, leave_the_prompt, saved, tells, vote

pytestmark = [
    pytest.mark.browser,
    # Gradio sums up its queue in ways that the newest pandas calls deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

WINDOWS = [
    pytest.param(1440, 900, "en-US", "light", id="desk"),
    pytest.param(1024, 768, "zh-CN", "dark", id="tablet-chinese-dark"),
    pytest.param(390, 844, "zh-CN", "light", id="phone-chinese"),
    pytest.param(390, 844, "en-US", "dark", id="phone-dark"),
]


def open_tab(page, name: str) -> None:
    page.locator(f"#tab-{name}-button").click()


@pytest.mark.parametrize(("width", "height", "locale", "scheme"), WINDOWS)
def test_nothing_is_cut_or_overlaps(serve, visit, width, height, locale, scheme):
    touch = {"is_mobile": True, "has_touch": True} if width < 640 else {}
    site = serve((FIRST, SECOND, BASE, TWIN), blind=False)
    page = visit(
        site, viewport={"width": width, "height": height}, locale=locale, color_scheme=scheme, **touch
    ).page  # fmt: skip
    for toggle in ("#why button", "#sampling button"):
        page.locator(toggle).first.click()
    ask(page, "你好，狐狸在哪里？ " + "averylongwordwithoutanyspace" * 8)
    page.locator("#shift").click()
    page.locator("#shift-d .tok").first.wait_for()

    assert page.evaluate(MISFITS) == []
    assert page.locator("html").get_attribute("lang") == ("zh-CN" if locale == "zh-CN" else "en")
    if locale == "zh-CN":
        assert page.locator("#ask").inner_text() == "提问"
        assert "哪个回答更好" in page.locator("#status").inner_text()
    if width < 640:
        heights = [page.locator(f"#{name}").bounding_box()["height"] for name in ("vote-a", "vote-tie", "ask", "stop")]
        assert min(heights) >= 42
    vote(page, "bad")
    open_tab(page, "leaderboard")
    page.locator("#standings table").first.wait_for()
    assert page.evaluate(MISFITS) == []
    open_tab(page, "models")
    page.locator("#model .tree").first.wait_for()
    assert page.evaluate(MISFITS) == []


def test_tokens_tell_what_else_could_have_stood_there_to_mouse_and_keyboard(serve, visit):
    page = visit(serve((FIRST, SECOND), blind=False)).page
    ask(page, "<img src=x onerror=alert(1)> hello")
    leave_the_prompt(page)
    page.keyboard.press("t")
    token = page.locator("#shift-a .tok")
    token.first.wait_for()
    assert "<img" in page.locator("#shift-a .tokens").text_content()

    token.nth(2).hover()
    tip = page.locator("#tip")
    tip.wait_for()
    assert "nat" in tip.inner_text()
    assert "this model" in tip.inner_text()
    assert page.locator("#shift-a .m1, #shift-a .m2").count() > 0
    assert page.locator(".legend .scale i").count() == 9
    token.first.focus()
    first = tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != first
    assert page.locator("#shift-a .tok[tabindex='0']").count() == 1

    leave_the_prompt(page)
    page.keyboard.press("t")
    token.first.wait_for(state="detached")


def test_a_review_queue_is_judged_blind_and_goes_on_after_a_reload(serve, visit):
    site = serve(prompts=("first question", "second question", "third question"))
    window = visit(site)
    page = window.page
    open_tab(page, "review")
    page.locator("#review-status .answered").wait_for()
    page.locator("#review-vote-a:not([disabled])").wait_for()
    assert not any(name in page.content() for name in (FIRST, SECOND))
    assert site.told() == set()

    leave_the_prompt(page)
    page.keyboard.press("1")
    page.locator("#review-status .saved").wait_for()
    assert FIRST in page.locator("#review-status").inner_text()
    tells(page, "#review-progress", "1 of 3")
    page.keyboard.press("n")
    page.locator("#review-status .answered").wait_for()
    hides(page, FIRST)

    page.reload()
    page.locator("#ask").wait_for(timeout=TIMEOUT)
    open_tab(page, "review")
    page.locator("#review-status .answered").wait_for()
    tells(page, "#review-progress", "1 of 3")
    asked = [page.locator("#review-pane-a .user").inner_text()]
    for _ in range(2):
        page.locator("#review-vote-tie").click()
        page.locator("#review-status .saved").wait_for()
        page.wait_for_timeout(1100)  # a second vote within a second would be an impatient click
        page.locator("#review-next").click()
        page.locator("#review-status .answered, #review-status .saved:has-text('every comparison')").wait_for()
        asked.append(page.locator("#review-pane-a .user").inner_text())
    tells(page, "#review-progress", "3 of 3")
    rows = site.rows()
    assert sorted(row["prompt"][0]["content"] for row in rows) == [
        "first question",
        "second question",
        "third question",
    ]
    assert [row["choice"] for row in rows] == ["a", "tie", "tie"]
    assert len({row["voter"] for row in rows}) == 1
    assert all(row["mode"] == "blind" and row["review"] for row in rows)


def test_leaderboard_and_models_open_after_a_vote_and_tell_what_the_votes_cannot(serve, visit):
    site = serve()
    page = visit(site).page
    open_tab(page, "leaderboard")
    page.locator("#standings .empty").wait_for()
    page.locator("[role=tab]").first.click()
    ask(page, "one")
    vote(page, "a")

    open_tab(page, "leaderboard")
    page.locator("#standings table").first.wait_for()

    told = page.locator("#standings").inner_text()
    assert all(name in told for name in (FIRST, SECOND, "Position bias", "reward model"))
    open_tab(page, "models")
    page.locator("#model .tree").first.wait_for()
    page.locator("#pick label").nth(1).click()
    page.locator(f"#model .tree b:has-text('{SECOND}')").wait_for()
    assert BASE in page.locator("#model").inner_text()


def test_a_screen_reader_hears_which_answer_is_which_and_what_changed(serve, visit):
    page = visit(serve()).page
    ask(page, "one")

    labels = [page.locator(f"#pane-{pane} [role=log]").get_attribute("aria-label") for pane in "ab"]
    assert labels == ["Answer A", "Answer B"]
    assert page.locator("#status [aria-live=polite], #status[aria-live=polite]").count() >= 1
    assert page.get_by_label("Question to all models").count() == 1
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => b.offsetParent && !b.innerText.trim()"
        " && !b.getAttribute('aria-label') && !b.title).map(b => b.outerHTML)"
    )
    assert unnamed == []


def test_the_page_keeps_nothing_but_a_pseudonym_in_the_browser(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "one")
    vote(page, "a")
    saved(page)

    kept = json.loads(page.evaluate("JSON.stringify({...localStorage})"))
    assert not any(name in str(kept) for name in (FIRST, SECOND))
    assert kept["align-voter"] == site.rows()[0]["voter"]
