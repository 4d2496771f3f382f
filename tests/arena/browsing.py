"""What a visitor does on the page, as tests say it."""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

import pytest

FIRST, SECOND, BASE, TWIN = "crimson-sft", "azure-dpo", "granite-base", "scarlet-copy"
JUDGE = "amber-judge"
TIMEOUT = 120_000

# Everything one can read or press must be inside the window, and no two buttons or fields may share a spot.
MISFITS = """() => {
  const shown = [...document.querySelectorAll('button, textarea, input, .tok, .status p, .facts > div, .pane, th, td')]
    .filter((node) => node.offsetParent && !node.closest('.scroll, .hide, footer, [role=log], [aria-hidden=true]'));
  const found = [];
  const whole = document.documentElement;
  if (whole.scrollWidth > whole.clientWidth) found.push('the page scrolls sideways');
  for (const node of shown) {
    const box = node.getBoundingClientRect();
    const name = `${node.tagName}#${node.id}.${node.className} "${(node.innerText || '').slice(0, 20)}"`;
    if (box.left < -1 || box.right > innerWidth + 1) found.push(`outside: ${name}`);
    const cut = node.scrollWidth > node.clientWidth + 1;
    if (node.tagName === 'BUTTON' && node.innerText && cut) found.push(`cut: ${name}`);
  }
  const pressed = shown.filter((node) => ['BUTTON', 'TEXTAREA'].includes(node.tagName) && node.innerText !== undefined
    && node.getBoundingClientRect().width > 30);
  for (const one of pressed) for (const other of pressed) {
    if (one === other || one.contains(other) || other.contains(one)) continue;
    const [a, b] = [one.getBoundingClientRect(), other.getBoundingClientRect()];
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
      found.push(`overlap: #${one.id} ${one.innerText} and #${other.id} ${other.innerText}`);
  }
  return found;
}"""


def without_browser(reason: str) -> NoReturn:
    """Skip what needs a browser; where ALIGN_REQUIRE_BROWSER=1, that is a failure."""
    required = os.environ.get("ALIGN_REQUIRE_BROWSER") == "1"
    pytest.fail(reason) if required else pytest.skip(reason)


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    """Type a question and send it."""
    mark(page)
    page.locator("#prompt textarea").fill(text)
    page.keyboard.press("Enter")
    if wait:
        answered(page)


def mark(page: Any) -> None:
    """Mark what the page says now, so that `answered` waits for something newer."""
    page.evaluate("document.querySelector('#status p')?.setAttribute('data-old', '')")


def answered(page: Any) -> None:
    """Wait until every answer is there and can be judged; the page draws its parts one after the other."""
    page.locator("#status .answered:not([data-old])").wait_for(timeout=TIMEOUT)
    page.locator("#vote-a:not([disabled])").wait_for(timeout=TIMEOUT)


def tells(page: Any, place: str, *words: str) -> None:
    """Wait until a part of the page says some words."""
    for word in words:
        page.locator(f"{place}:has-text({json.dumps(word)})").first.wait_for(timeout=TIMEOUT)


def hides(page: Any, *words: str) -> None:
    """Wait until nothing on the page says any of some words."""
    said = f"{json.dumps(words)}.every(word => !document.body.innerHTML.includes(word))"
    page.wait_for_function(said, timeout=TIMEOUT)


def growing(page: Any, letters: int = 10) -> None:
    """Wait until both answers are being written."""
    lengths = "['#pane-a','#pane-b'].map(id => document.querySelector(id).querySelector('.bot')?.innerText.length || 0)"
    page.wait_for_function(f"{lengths}.every(length => length > {letters})", timeout=TIMEOUT)


def vote(page: Any, choice: str) -> None:
    """Click a vote and wait until it is saved."""
    page.locator(f"#vote-{choice}").click()
    saved(page)


def saved(page: Any) -> None:
    """Wait until a vote is saved."""
    page.locator("#status .saved").wait_for(timeout=TIMEOUT)


def leave_the_prompt(page: Any) -> None:
    """Put the focus where keys are not typed."""
    page.evaluate("document.activeElement.blur()")


def set_field(page: Any, name: str, value: str) -> None:
    """Open the settings if they are closed, and fill one in."""
    field = page.locator(f"#{name}").locator("input[type=number], textarea, input[type=text]").first
    if not field.is_visible():
        page.locator("#sampling button").first.click()
        field.wait_for()
        page.wait_for_timeout(300)  # what was folded is built anew, and may take back what was typed meanwhile
    field.fill(value)
    field.press("Tab")
    # Of two changes within one of the browser's frames gradio sends only the later one.
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
