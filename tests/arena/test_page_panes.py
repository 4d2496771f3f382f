"""One pane in place of all of them: by its button, by a key, and without telling anything."""

from __future__ import annotations

import pytest
from browsing import ask, leave_the_prompt

pytestmark = [
    pytest.mark.browser,
    # Gradio sums up its queue in ways that the newest pandas calls deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


def test_a_pane_is_expanded_by_key_and_by_button_and_both_come_back(serve, visit):
    site = serve(prompts=("first question", "second question", "third question"))
    page = visit(site).page
    ask(page, "one")
    first, second = page.locator("#pane-a"), page.locator("#pane-b")
    narrow = first.bounding_box()["width"]

    leave_the_prompt(page)
    page.keyboard.press("f")
    second.wait_for(state="hidden")
    assert first.bounding_box()["width"] > 1.9 * narrow
    page.keyboard.press("f")
    first.wait_for(state="hidden")
    assert second.is_visible()
    page.keyboard.press("f")
    first.wait_for()
    assert second.is_visible()

    button = page.get_by_role("button", name="Expand: Answer B", exact=True)
    button.click()
    first.wait_for(state="hidden")
    assert button.get_attribute("aria-pressed") == "true"
    ask(page, "two")
    second.locator(".bot").nth(1).wait_for()
    button.click()
    first.wait_for()
    first.locator(".bot").nth(1).wait_for()
    assert button.get_attribute("aria-pressed") == "false"
    assert site.told() == set()

    page.locator("#tab-review-button").click()
    page.locator("#review-status .answered").wait_for()
    leave_the_prompt(page)
    page.keyboard.press("f")
    page.locator("#review-pane-b").wait_for(state="hidden")
    assert page.locator("#review-pane-a").is_visible()
