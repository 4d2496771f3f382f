"""The comparison page in a real browser: asking, judging, keys, and what must not be told before a vote."""

from __future__ import annotations

import contextlib
import re

import pytest
from browsing import (
    BASE,
    FIRST,
    JUDGE,
    SECOND,
    answered,
    ask,
    growing,
    hides,
    leave_the_prompt,
    mark,
    saved,
    set_field,
    tells,
    vote,
    without_browser,
)

pytestmark = [
    pytest.mark.browser,
    # Gradio sums up its queue in ways that the newest pandas calls deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


def test_a_blind_page_tells_no_name_before_the_vote_and_everything_after(serve, visit):
    site = serve()
    page = visit(site).page
    for tab in ("leaderboard", "models"):
        page.locator(f"#tab-{tab}-button").click()
        page.locator(f"#{'standings' if tab == 'leaderboard' else 'model'} .empty").wait_for()
    page.locator("[role=tab]").first.click()
    ask(page, "one")

    sent = site.recorder.sent.decode(errors="replace")
    digests = [(one.digest or "?").removeprefix("sha256:")[:12] for one in site.arena.setup.contestants]
    assert all(f"{voice} says" in sent for voice in ("rose", "sky"))
    assert [told for told in (FIRST, SECOND, BASE, JUDGE, *digests) if told in sent] == []
    assert not re.search(r"first after \d", sent)
    assert not any(name in page.content() for name in (FIRST, SECOND, BASE, JUDGE))
    assert " ms" not in page.locator("#status").inner_text()
    assert page.locator("#shift").is_disabled()

    vote(page, "a")
    told = page.locator("#status").inner_text()
    assert all(word in told for word in (FIRST, SECOND, " ms", "reward"))
    [row] = site.rows()
    assert f"seed {row['seed']}" in told
    assert all(digest.removeprefix("sha256:")[:12] in told for digest in row["digests"].values())
    tells(page, "#panes", FIRST, SECOND)
    assert site.told() == {FIRST, SECOND}
    page.locator("#sampling button").first.click()
    tells(page, "#seed", "secret salt")


def test_a_new_question_after_a_vote_is_blind_again(serve, visit):
    page = visit(serve()).page
    ask(page, "one")
    vote(page, "tie")
    page.locator("#tab-models-button").click()
    page.locator("#model svg, #model .empty").first.wait_for()
    tells(page, "#pick", FIRST)
    page.locator("[role=tab]").first.click()

    ask(page, "two")

    hides(page, FIRST, SECOND)


def test_every_key_does_what_the_list_of_keys_says(serve, visit):
    site = serve()
    page = visit(site).page
    page.locator("#prompt textarea").fill("1 and 2, never N?")
    page.keyboard.press("Control+Enter")
    for key in "1234":
        answered(page)
        leave_the_prompt(page)
        page.keyboard.press(key)
        saved(page)
        page.keyboard.press("n")
        page.wait_for_function("!document.querySelector('#pane-a .bot')")
        if key != "4":
            ask(page, "again", wait=False)

    assert [row["choice"] for row in site.rows()] == ["a", "b", "tie", "bad"]
    assert site.rows()[0]["prompt"] == [{"role": "user", "content": "1 and 2, never N?"}]
    leave_the_prompt(page)
    page.keyboard.press("?")
    assert "Ctrl" in page.locator("dialog.help[open]").inner_text()
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    assert page.locator("dialog.help[open]").count() == 0


def test_letters_typed_into_a_field_are_only_text(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "one")
    page.locator("#why button").first.click()

    for field in ("#prompt textarea", "#reason textarea, #reason input"):
        page.locator(field).first.press_sequentially("12nt?")
        assert page.locator(field).first.input_value() == "12nt?"

    assert site.rows() == []
    assert page.locator("dialog.help[open]").count() == 0
    assert page.locator("#status .answered").is_visible()


def test_a_vote_carries_provenance_reason_tags_and_a_pseudonym(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "the quick brown fox")
    page.locator("#why button").first.click()
    page.get_by_label("Correct").check()
    page.locator("#reason textarea, #reason input").first.fill("It answers <b>the question</b>.")
    vote(page, "b")

    [row] = site.rows()
    assert (row["reason"], row["tags"]) == ("It answers <b>the question</b>.", ["correct"])
    assert row["voter"].startswith("v")
    assert (row["mode"], row["truncated"]) == ("blind", False)
    assert set(row["models"].values()) == {f"{FIRST}@v1", f"{SECOND}@v1"}
    assert all(digest.startswith("sha256:") for digest in row["digests"].values())
    assert row["base"]["digests"]["weights"].startswith("sha256:")
    assert row["reward_model"]["reference"] == f"{JUDGE}@v1"
    page.wait_for_function("[...document.querySelectorAll('#reason textarea, #reason input')].every(one => !one.value)")


def test_a_vote_while_the_answers_are_written_stops_them_and_is_marked(serve, visit):
    site = serve(tokens=1000)
    page = visit(site).page
    ask(page, "slow", wait=False)
    growing(page)

    vote(page, "b")

    [row] = site.rows()
    assert row["truncated"] is True
    assert all(len(row[side][0]["content"].split()) < 1000 for side in "ab")
    page.locator(f"#status .facts:has-text('{FIRST}')").wait_for()
    page.locator("#ask:not([disabled])").wait_for()


def test_a_double_click_and_impatient_keys_write_one_row(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "one")

    page.evaluate("for (const id of ['vote-b', 'vote-b', 'vote-a']) document.getElementById(id).click()")
    saved(page)
    page.wait_for_timeout(300)

    assert [row["choice"] for row in site.rows()] == ["b"]


def test_a_click_sent_again_judges_no_later_answer(serve, visit):
    site = serve()
    page = visit(site).page
    posted = []
    page.on("request", lambda request: posted.append(request) if "/queue/join" in request.url else None)
    ask(page, "one")
    vote(page, "a")
    replay = posted[-1]
    ask(page, "two")

    response = page.request.post(replay.url, data=replay.post_data, headers={"content-type": "application/json"})
    page.wait_for_timeout(500)

    assert response.ok, response.text()
    assert len(site.rows()) == 1


def test_named_panes_show_names_and_the_votes_of_three_are_for_the_best(serve, visit):
    site = serve((FIRST, SECOND, BASE), blind=False)
    page = visit(site).page
    for pane, name in zip("abc", (FIRST, SECOND, BASE), strict=True):
        assert name in page.locator(f"#pane-{pane}").inner_text()
    ask(page, "the quick brown fox")
    assert " ms" in page.locator("#status").inner_text()

    leave_the_prompt(page)
    page.keyboard.press("2")
    saved(page)

    assert [row["models"][row["choice"]] for row in site.rows()] == [f"{SECOND}@v1"] * 2


def test_a_conversation_goes_on_is_regenerated_with_a_new_seed_and_left(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "one")
    ask(page, "two")
    before = page.locator("#pane-a").inner_text()

    mark(page)
    page.locator("#again").click()
    answered(page)
    assert page.locator("#pane-a").inner_text() != before
    assert "seed" not in page.locator("#status").inner_text()
    vote(page, "a")

    [row] = site.rows()
    assert row["turns"][0]["seed"] != row["turns"][1]["seed"] == row["seed"]
    assert [message["role"] for message in row["a"]] == ["assistant", "user", "assistant"]
    assert [turn["regenerated"] for turn in row["turns"]] == [0, 1]
    page.locator("#new").click()
    page.wait_for_function("!document.querySelector('#pane-a .bot')")
    page.locator("#vote-a[disabled]").wait_for()


def test_an_edited_question_replaces_the_last_one(serve, visit):
    site = serve()
    page = visit(site).page
    ask(page, "one")
    ask(page, "too")
    mark(page)

    page.locator("#edit").click()
    page.locator("#status .editing").wait_for()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'too'")
    ask(page, "two")
    vote(page, "a")

    [row] = site.rows()
    asked = [message["content"] for message in [*row["prompt"], *row["a"]] if message["role"] == "user"]
    assert asked == ["one", "two"]


def test_a_missing_browser_is_a_failure_where_one_is_required(monkeypatch):
    monkeypatch.setenv("ALIGN_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception):
        without_browser("none")
    monkeypatch.delenv("ALIGN_REQUIRE_BROWSER")
    with pytest.raises(pytest.skip.Exception):
        without_browser("none")


def test_settings_and_system_prompt_reach_the_engine_and_the_vote(serve, visit):
    site = serve(blind=False, seed=None)
    page = visit(site).page
    for name, value in (("seed", "77"), ("top_k", "40"), ("min_p", "0.1"), ("repetition_penalty", "1.2")):
        set_field(page, name, value)
    set_field(page, "system", "Be brief.")
    ask(page, "one")
    vote(page, "a")
    set_field(page, "seed", "")
    ask(page, "one")
    vote(page, "a")

    first, second = site.rows()
    assert first["seed"] == 77
    assert second["seed"] not in (0, 77)
    kept = {"temperature": 1.0, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2, "max_new_tokens": 32}
    assert first["sampling"].items() >= kept.items()
    assert first["prompt"][0] == {"role": "system", "content": "Be brief."}
    set_field(page, "seed", "many")
    ask(page, "one", wait=False)
    page.locator("#status .refused").wait_for()


def test_text_of_a_model_reaches_no_other_machine_and_is_never_html(serve, visit):
    window = visit(serve((FIRST, SECOND), blind=False))
    page = window.page
    evil = (
        "![](http://tracker.example/a.png) <img src='http://tracker.example/b.png'> <script>window.hit=1</script> "
        "<style>body{display:none}</style> [link](javascript:window.hit=1) <b>bold</b> ${window.hit=1} {{value}}"
    )
    ask(page, evil)
    page.locator("#shift").click()
    page.locator("#shift-a .tok").first.wait_for()

    for place in ("#pane-a .bot", "#shift-a"):
        assert "<b>bold</b>" in page.locator(place).inner_text()
        assert page.locator(f"{place} b:has-text('bold'), {place} script, {place} style").count() == 0
    assert page.evaluate("window.hit === undefined")
    assert (window.outside, window.errors) == ([], [])
    assert page.locator("#ask").is_visible()


def test_one_failed_pane_leaves_the_other_and_names_nobody(serve, visit):
    site = serve()
    page = visit(site).page

    ask(page, "fail", wait=False)

    page.locator("#status .failed").wait_for()
    tells(page, "#panes", "sky says", "could not answer")
    page.locator("#vote-a[disabled]").wait_for()
    assert site.told() == set()


def test_the_page_describes_no_api_and_keeps_no_history(serve):
    from urllib.error import HTTPError
    from urllib.request import urlopen

    site = serve()
    with urlopen(site.url + "gradio_api/info") as response:
        assert b'"named_endpoints":{}' in response.read().replace(b" ", b"")
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    for path in ("gradio_api/runs", "monitoring", "docs", "openapi.json"):
        with contextlib.suppress(HTTPError), urlopen(site.url + path) as response:
            assert b"calls" not in response.read()
    assert site.told() == set()


def test_two_visitors_run_at_once_without_mixing(serve, visit):
    site = serve(tokens=1000)
    first, second = visit(site).page, visit(site).page

    ask(first, "slow fox", wait=False)
    growing(first)
    ask(second, "nine blue eggs")
    assert first.locator("#status .streaming").count() == 1
    first.keyboard.press("Escape")
    answered(first)

    assert "nine" not in first.locator("#panes").inner_text()
    assert "slow" not in second.locator("#panes").inner_text()
    for page in (first, second):
        vote(page, "a")
    assert sorted(row["prompt"][0]["content"] for row in site.rows()) == ["nine blue eggs", "slow fox"]
    assert len({row["voter"] for row in site.rows()}) == 2
