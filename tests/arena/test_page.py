"""The page in a real browser, over a real engine with two adapters on one base."""

from __future__ import annotations

import contextlib
import time

import pytest

pytestmark = [
    pytest.mark.browser,
    # Gradio sums up its queue in ways that the newest pandas calls deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

FIRST, SECOND, BASE = "crimson-sft", "azure-dpo", "granite-base"
ANSWERS = "['#pane-a','#pane-b'].map(id => document.querySelector(id).querySelector('.bot')?.innerText.length || 0)"


def ask(page, text: str, *, wait: bool = True) -> None:
    mark(page)
    page.locator("#prompt textarea").fill(text)
    page.keyboard.press("Enter")
    if wait:
        settled(page)


def mark(page) -> None:
    """Mark what the page says now, so that `settled` waits for something newer."""
    page.evaluate("document.querySelector('#status p')?.setAttribute('data-old', '')")


def settled(page) -> None:
    page.wait_for_function(
        "!document.querySelector('#status [data-old]') && !document.getElementById('vote-a').disabled", timeout=30_000
    )


def saved(page) -> None:
    page.locator("#status .saved").wait_for(timeout=10_000)


def leave_the_prompt(page) -> None:
    page.locator("#head").click()


def lengthen(page, tokens: int) -> None:
    page.locator("#sampling button").first.click()
    field = page.locator("#sampling input[type=number]").nth(2)
    field.fill(str(tokens))
    field.press("Tab")


def test_all_panes_grow_before_any_is_done(serve, visit):
    site = serve()
    page = visit(site).page
    lengthen(page, 600)

    ask(page, "the quick brown fox", wait=False)

    page.wait_for_function(f"{ANSWERS}.every(length => length > 10)", timeout=20_000)
    first = page.evaluate(ANSWERS)
    assert page.locator("#vote-a").is_disabled()
    page.wait_for_function(f"{ANSWERS}.every((length, i) => length > {first}[i])", timeout=20_000)
    assert page.locator("#vote-a").is_disabled()
    page.locator("#stop").click()
    settled(page)


def test_no_name_reaches_a_blind_page_before_the_vote_and_all_do_after(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "the quick brown fox")

    assert site.told() == set()
    assert not any(name in page.content() for name in (FIRST, SECOND, BASE))
    assert "ms" not in page.locator("#status").inner_text()

    page.locator("#vote-a").click()
    saved(page)
    assert FIRST in page.locator("#status").inner_text()
    assert SECOND in page.locator("#status").inner_text()
    for pane in ("#pane-a", "#pane-b"):
        assert any(name in page.locator(pane).inner_text() for name in (FIRST, SECOND))


def test_a_new_question_after_a_vote_is_blind_again(serve, visit):
    page = visit(serve()).page
    ask(page, "one")
    page.locator("#vote-tie").click()
    saved(page)

    ask(page, "two")

    assert not any(name in page.locator("body").inner_text() for name in (FIRST, SECOND))


@pytest.mark.parametrize(("key", "choice"), [("1", "a"), ("2", "b"), ("3", "tie"), ("4", "bad")])
def test_a_key_votes(serve, visit, key, choice):
    site = serve()
    page = visit(site).page
    ask(page, "the quick brown fox")

    leave_the_prompt(page)
    page.keyboard.press(key)
    saved(page)

    [row] = site.rows()
    assert row["choice"] == choice
    assert row["prompt"] == [{"role": "user", "content": "the quick brown fox"}]
    assert row["mode"] == "blind"
    assert row["seed"] == 0
    assert set(row["models"].values()) == {f"{FIRST}@v1", f"{SECOND}@v1"}
    assert all(digest.startswith("sha256:") for digest in row["digests"].values())
    assert row["base"]["digests"]["weights"].startswith("sha256:")
    assert row["a"][0]["content"] != row["b"][0]["content"]


def test_a_digit_typed_into_the_prompt_does_not_vote(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "the quick brown fox")

    page.locator("#prompt textarea").press_sequentially("1 and 2")
    assert page.locator("#prompt textarea").input_value() == "1 and 2"
    leave_the_prompt(page)
    page.keyboard.press("3")
    saved(page)

    assert [row["choice"] for row in site.rows()] == ["tie"]


def test_a_double_click_and_impatient_keys_write_one_row(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "the quick brown fox")

    page.evaluate("for (const id of ['vote-b', 'vote-b', 'vote-a']) document.getElementById(id).click()")
    saved(page)
    page.wait_for_timeout(500)

    assert [row["choice"] for row in site.rows()] == ["b"]


def test_a_click_sent_again_judges_no_later_answer(serve, visit):
    site = serve()
    page = visit(site).page
    posted = []
    page.on("request", lambda request: posted.append(request) if "/queue/join" in request.url else None)
    ask(page, "one")
    page.locator("#vote-a").click()
    saved(page)
    replay = posted[-1]
    ask(page, "two")

    response = page.request.post(replay.url, data=replay.post_data, headers={"content-type": "application/json"})
    page.wait_for_timeout(1000)

    assert response.ok, response.text()
    assert len(site.rows()) == 1


def test_stop_ends_both_and_what_is_there_can_be_judged(serve, visit):
    site = serve()
    page = visit(site).page
    lengthen(page, 1000)
    ask(page, "the quick brown fox", wait=False)
    page.wait_for_function(f"{ANSWERS}.every(length => length > 5)", timeout=20_000)
    started = time.monotonic()

    page.keyboard.press("Escape")
    settled(page)

    assert time.monotonic() - started < 5
    page.locator("#vote-b").click()
    saved(page)
    [row] = site.rows()
    assert "cancelled" in {row["turns"][0][side]["reason"] for side in "ab"}
    assert all(row["turns"][0][side]["tokens"] < 1000 for side in "ab")


def test_closing_the_page_frees_the_engine(serve, visit):
    from align.engine.protocol import Row, Sampling

    site = serve()
    window = visit(site)
    lengthen(window.page, 1000)
    ask(window.page, "the quick brown fox", wait=False)
    window.page.wait_for_function(f"{ANSWERS}.every(length => length > 5)", timeout=20_000)

    window.page.close()

    started = time.monotonic()
    row = Row(f"{FIRST}@v1", [{"role": "user", "content": "hi"}])
    site.arena.engine.complete([row], Sampling(temperature=0, max_new_tokens=2))
    assert time.monotonic() - started < 4


def test_named_panes_show_their_names_and_the_votes_of_three_are_for_the_best(serve, visit):
    site = serve((FIRST, SECOND, BASE), blind=False)
    page = visit(site).page
    for pane, name in zip("abc", (FIRST, SECOND, BASE), strict=True):
        assert name in page.locator(f"#pane-{pane}").inner_text()
    ask(page, "the quick brown fox")
    assert "ms" in page.locator("#status").inner_text()

    leave_the_prompt(page)
    page.keyboard.press("2")
    saved(page)

    winners = [row["models"][row["choice"]] for row in site.rows()]
    assert winners == [f"{SECOND}@v1"] * 2


def test_a_conversation_goes_on_and_can_be_regenerated(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "one")
    ask(page, "two")
    before = page.locator("#pane-a").inner_text()

    mark(page)
    page.locator("#again").click()
    settled(page)
    assert page.locator("#pane-a").inner_text() != before
    page.locator("#vote-a").click()
    saved(page)

    [row] = site.rows()
    assert [message["role"] for message in row["a"]] == ["assistant", "user", "assistant"]
    assert [turn["regenerated"] for turn in row["turns"]] == [0, 1]


def test_new_leaves_a_battle_without_a_vote(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "the quick brown fox")

    page.locator("#new").click()

    page.wait_for_function("!document.querySelector('#pane-a .bot')")
    assert page.locator("#vote-a").is_disabled()
    assert site.rows() == []


def test_settings_reach_the_engine_and_the_vote(serve, visit):
    site = serve(seed=None)
    page = visit(site).page
    page.locator("#sampling button").first.click()
    page.locator("#seed textarea, #seed input").fill("77")
    ask(page, "one")
    page.locator("#vote-a").click()
    saved(page)
    page.locator("#seed textarea, #seed input").fill("")
    ask(page, "one")
    page.locator("#vote-a").click()
    saved(page)

    first, second = site.rows()
    assert first["seed"] == 77
    assert second["seed"] not in (0, 77)
    assert first["sampling"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 120}


def test_a_seed_that_is_no_number_is_refused(serve, visit):
    page = visit(serve()).page
    page.locator("#sampling button").first.click()
    page.locator("#seed textarea, #seed input").fill("many")

    ask(page, "one", wait=False)

    refusal = page.locator("#status .refused")
    refusal.wait_for(timeout=10_000)
    assert refusal.inner_text().strip()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chinese_on_a_phone_fits(serve, visit, scheme):
    phone = {"width": 390, "height": 844}
    page = visit(serve(), viewport=phone, locale="zh-CN", color_scheme=scheme, is_mobile=True, has_touch=True).page
    ask(page, "你好，狐狸在哪里？")

    assert page.locator("#ask").inner_text() == "提问"
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for button in ("#vote-a", "#vote-b", "#vote-tie", "#vote-bad", "#ask", "#stop"):
        box = page.locator(button).bounding_box()
        assert box["height"] >= 42, button
    page.locator("#vote-bad").tap()
    saved(page)
    assert "投票已保存" in page.locator("#status").inner_text()


def test_text_of_a_model_reaches_no_other_machine_and_runs_nothing(serve, visit):
    from align.engine.fake import FakeEngine

    evil = (
        "![](http://tracker.example/a.png) <img src='http://tracker.example/b.png'> <script>window.hit=1</script> "
        "<style>body{display:none}</style> [link](javascript:window.hit=1) <b>bold</b>"
    )
    window = visit(serve(speaker=FakeEngine([], lambda row: evil)))
    ask(window.page, "hello")

    assert "bold" in window.page.locator("#pane-a").inner_text()
    assert window.page.evaluate("window.hit === undefined")
    # The policy stops the images before they become requests; the browser reports each on its console.
    assert window.outside == []
    assert all("Content Security Policy" in error for error in window.errors)
    assert window.page.locator("#ask").is_visible()
    window.errors.clear()


def test_one_failed_pane_leaves_the_other_and_names_nobody(serve, visit):
    from align.engine.fake import FakeEngine

    site = serve(speaker=FakeEngine([], lambda row: None if FIRST in row.model else "a fine answer"))
    page = visit(site).page

    ask(page, "hello", wait=False)

    page.locator("#status .failed").wait_for(timeout=10_000)
    assert "a fine answer" in page.locator("#panes").inner_text()
    assert "could not answer" in page.locator("#panes").inner_text()
    assert page.locator("#vote-a").is_disabled()
    assert site.told() == set()


def test_the_page_describes_no_api_and_keeps_no_history(serve):
    from urllib.error import HTTPError
    from urllib.request import urlopen

    site = serve()
    with urlopen(site.url + "gradio_api/info") as response:
        assert b'"named_endpoints":{}' in response.read().replace(b" ", b"")
    for path in ("gradio_api/runs", "monitoring", "docs", "openapi.json"):
        with contextlib.suppress(HTTPError), urlopen(site.url + path) as response:
            assert b"calls" not in response.read()
    assert site.told() == set()


def test_two_visitors_run_at_once_without_mixing(serve, visit):
    site = serve()
    first, second = visit(site).page, visit(site).page

    ask(first, "the quick brown fox", wait=False)
    ask(second, "nine blue eggs", wait=False)
    settled(first)
    settled(second)

    assert "nine blue eggs" not in first.locator("#panes").inner_text()
    assert "the quick brown fox" not in second.locator("#panes").inner_text()
    for page in (first, second):
        page.locator("#vote-a").click()
        saved(page)
    assert sorted(row["prompt"][0]["content"] for row in site.rows()) == ["nine blue eggs", "the quick brown fox"]
