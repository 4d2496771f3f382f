"""Which words only one of two answers has: as text, and on the page."""

from __future__ import annotations

import pytest
from browsing import BASE, FIRST, MISFITS, SECOND, ask, leave_the_prompt, saved

from align.arena.battle_view import mark_differences, render_word_differences
from align.arena.page_text import PAGE_TEXTS


def marked(pieces) -> list[str]:
    return [word for word, _, only_here in pieces if only_here]


@pytest.mark.parametrize(
    ("first", "second", "here", "there"),
    [
        ("the tent is red", "the tent is blue", ["red"], ["blue"]),
        ("the tent is red.", "the red tent is", ["red", "."], ["red"]),
        ("one\n\n  two", "one two", [], []),
        ("Don't go", "Do go", ["Don", "'", "t"], ["Do"]),
        ("水壶保修两年", "水壶保修一年", ["两"], ["一"]),
        ("用Python写", "用Java写", ["Python"], ["Java"]),
        ("", "all new", [], ["all", "new"]),
    ],
)
def test_words_are_marked_that_only_one_answer_has(first, second, here, there):
    pieces = mark_differences(first, second)

    assert tuple(map(marked, pieces)) == (here, there)
    for text, words in zip((first, second), pieces, strict=True):
        assert "".join(word + space for word, space, _ in words) == text


def test_long_answers_that_repeat_themselves_are_compared_too():
    words = "the cat and the dog " * 4000

    first, second = mark_differences(words + "left", words.replace("cat", "fox"))

    assert "left" in marked(first)
    assert "fox" in marked(second)


def test_what_is_shown_is_escaped_counted_and_said_aloud():
    first, second = render_word_differences(["<b>one</b> two", 'one "two"'], PAGE_TEXTS["en"])

    only_here = '<mark data-begin="[only here:" data-end="]">'
    assert f"{only_here}&lt;b&gt;</mark>one{only_here}&lt;/b&gt;</mark> two" in first
    assert "2 of 4 words only here" in first
    assert f"one {only_here}&quot;</mark>two{only_here}&quot;</mark>" in second
    assert 'aria-label="Answer B, with the words marked that only it has"' in second


def on_pages(test):
    """Mark a test that drives the page in a browser."""
    # Gradio sums up its queue in ways that the newest pandas calls deprecated.
    for deprecated in ("'future.no_silent_downcasting' is deprecated", "The copy keyword is deprecated"):
        test = pytest.mark.filterwarnings(f"ignore:{deprecated}")(test)
    return pytest.mark.browser(test)


@on_pages
def test_a_blind_page_shows_the_difference_and_names_nobody(serve, visit):
    site = serve()
    page = visit(site).page
    assert page.locator("#difference").is_disabled()
    ask(page, "<img src=x onerror=alert(1)> one")
    page.locator("#difference:not([disabled])").wait_for()

    leave_the_prompt(page)
    page.keyboard.press("d")
    marks = page.locator("#shift-a mark, #shift-b mark")
    for box in ("#shift-a", "#shift-b"):
        page.locator(f"{box} mark").wait_for()

    assert {text.strip() for text in marks.all_text_contents()} == {"rose", "sky"}
    assert "<img src=x" in page.locator("#shift-a").inner_text()
    assert site.told() == set()
    spoken = "getComputedStyle(document.querySelector('#shift-a mark'), '::before').content"
    assert page.evaluate(spoken) == '"[only here:"'
    page.keyboard.press("1")
    saved(page)
    page.locator("#shift:not([disabled])").wait_for()
    assert marks.count() == 2
    page.keyboard.press("t")
    page.locator("#shift-a .tok").first.wait_for()
    marks.first.wait_for(state="detached")
    page.keyboard.press("d")
    marks.first.wait_for()
    page.keyboard.press("d")
    marks.first.wait_for(state="detached")


@on_pages
def test_a_phone_shows_the_difference_in_chinese(serve, visit):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    page = visit(serve(), locale="zh-CN", **phone).page
    for toggle in ("#why button", "#sampling button"):
        page.locator(toggle).first.click()
    ask(page, "你好 " + "averylongwordwithoutanyspace" * 8)

    page.locator("#difference:not([disabled])").tap()
    page.locator("#shift-b mark").wait_for()

    assert page.locator("#difference").inner_text() == "词语差异"
    assert "1 个仅见于此" in page.locator("#shift-b summary").inner_text()
    assert page.evaluate(MISFITS) == []


@on_pages
def test_more_than_two_answers_have_no_difference(serve, visit):
    page = visit(serve((FIRST, SECOND, BASE), blind=False)).page
    ask(page, "one")

    assert page.locator("#shift").is_visible()
    assert page.locator("#difference").count() == 0
