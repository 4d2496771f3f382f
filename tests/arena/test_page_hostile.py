"""Answers that would restyle, cover, resize or leave the page: each stays in its pane, in a real browser."""

from __future__ import annotations

import pytest
from browsing import ask

pytestmark = [
    pytest.mark.browser,
    # Gradio sums up its queue in ways that the newest pandas calls deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

COVER = '<div style="position:fixed;inset:0;z-index:99999;background:red">cover</div>'
THEME = "%%{init: {'themeCSS': '} * { display: none !important } a {'}}%%\ngraph TD; A-->B"
AWAY = "http://elsewhere.example/"
FENCE = "```"
HOSTILE = {
    "a style sheet of a diagram": f"{FENCE}mermaid\n{THEME}\n{FENCE}",
    "a link in a diagram": f'{FENCE}mermaid\ngraph TD\nA-->B\nclick A "{AWAY}"\n{FENCE}',
    "a huge formula": r"$$\rule{2000em}{2000em} \kern-200em\raisebox{200em}{\rule{900em}{900em}}$$",
    "a formula of trusted commands": rf"$$\htmlId{{ask}}{{y}} \href{{{AWAY}}}{{x}} \includegraphics{{{AWAY}a.png}}$$",
    "a cover in a formula": f"$$ a<b {COVER} $$",
    "a cover after a fence in a list": f"- a\n  {FENCE}\n\n{COVER}",
    "a cover after ticks on two lines": f"a ` b\nc ` {COVER} ` d",
    "a cover in a table": f"| ` | b |\n|---|---|\n| ` {COVER} | ` |",
    "a button and a form": "a ` b\nc ` <button id='ask' class='votes'>Ask</button><form action='/x'><input></form> ` d",
    "a picture": f"a ` b\nc ` <img src='{AWAY}a.png' style='width:9999px'> ![x]({AWAY}b.png) ![]({AWAY}c.png)",
    "a picture in a link": f"[![x]({AWAY}a.png)](javascript:alert(1)) ![y][z]\n\n[z]: {AWAY}b.png",
    "a language that is JavaScript's": f"{FENCE}__proto__\nx\n{FENCE}\n\n~~~ constructor\nx\n~~~",
}
MORE = {
    "many edges": f"{FENCE}mermaid\ngraph TD\n" + "\n".join(f"n{n}-->n{n + 1}" for n in range(120)) + f"\n{FENCE}",
    "a broken diagram": f"{FENCE}mermaid\n}}}}{COVER}\n{FENCE}",
    "a diagram in a quote": f"> {FENCE}mermaid\n> graph TD\n> {FENCE}\n\n- {FENCE}mermaid\n  A\n  {FENCE}",
    "a formula in a table": "| a | b |\n|---|---|\n| $$\\rule{2000em}{9em}$$ | b |",
    "a wide table": f"|{'| '.join(f'column{n}' for n in range(80))}|\n|{'---|' * 80}\n",
    "a cover": COVER,
    "a cover between formulas": f"$$a$$ {COVER} $$b$$ %%%LATEX_BLOCK_0%%% \\$$ {COVER} $\\$",
    "a cover after an escaped tick": rf"\` {COVER} `",
    "a cover after an address": f"http://a.example/` {COVER} `",
    "a cover after a formula with a fence": f"$$\n{FENCE}\n$$\n{COVER}",
    "a cover after a title with a fence": f'[a]: /u "t\n{FENCE}\n"\n{COVER}',
    "a style sheet": "a ` b\nc ` <style>* { display: none !important }</style> ` d",
    "a frame and a link in HTML": f"<iframe src='{AWAY}'></iframe><a id=new href='{AWAY}' style='inset:0'>x</a>",
    "a comment and the like": f"<!-- {COVER} --> <![CDATA[ {COVER} ]]> <?php {COVER} ?> <!DOCTYPE x>",
    "other names of JavaScript's": "~~~hasOwnProperty\nx\n~~~\n\n~~~\\_\\_proto__\nx\n~~~\n\n~~~valueOf\nx\n~~~",
    "a long line": "x" * 20_000,
}

# The boxes of what is outside the answers, and whether a press on a button's middle reaches that button.
OUTSIDE = """() => [
  ...document.querySelectorAll('#votes button, #asking button, #prompt textarea, .pane, [role=tab], #top'),
].filter((node) => node.offsetParent).map((node) => {
    const box = node.getBoundingClientRect();
    const at = document.elementFromPoint(box.x + box.width / 2, box.y + Math.min(8, box.height / 2));
    const place = [box.x, box.y, box.width, box.height].map(Math.round);
    return [node.id || node.innerText, ...place, node.contains(at)].join(' ');
  }).concat([`${document.documentElement.scrollWidth} ${document.documentElement.scrollHeight}`, location.href])"""
# What Markdown, formulas and highlighted code do not consist of.
FOREIGN = """() => [...document.querySelectorAll('.pane .md *')].filter((node) =>
  !node.closest('.katex, .copy_code_button') && (node.id || node.hasAttribute('style') || node.hasAttribute('name')
    || node.matches('iframe, style, script, form, button, object, embed, svg, link, meta, div:not(.code_wrap)'))
  || node.matches('img, [id], .katex a')).map((node) => node.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("answers", [HOSTILE, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_no_answer_covers_resizes_or_leaves_the_page(serve, visit, answers):
    window = visit(serve(tokens=300))
    page, wrong = window.page, []
    ask(page, "plain")
    before = page.evaluate(OUTSIDE)
    for name, answer in answers.items():
        ask(page, f"{name}**\n\n{answer}\n\n")
        page.locator("#pane-a .bot", has_text=name).wait_for()
        found = [*set(before) ^ set(page.evaluate(OUTSIDE)), *page.evaluate(FOREIGN), *window.outside, *window.errors]
        wrong += [(name, found)] if found else []
        window.outside.clear()
        window.errors.clear()

    assert wrong == []
    assert page.locator("#ask").count() == 1
    told = page.locator("#pane-a").inner_text()
    assert "\N{WORD JOINER}" not in told
    assert 'style="position:fixed' in told


def test_code_is_shown_and_copied_as_written_and_links_open_beside_the_page(serve, visit):
    window = visit(serve(tokens=300))
    page, written = window.page, "<div>![x](u)</div>"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, f"[web]({AWAY}) [mail](mailto:x@example.com)\n\n{FENCE}html\n{written}\n{FENCE}\n\nend")
    answer = page.locator("#pane-a .bot")
    assert answer.locator("pre code").first.inner_text().strip() == written
    for button in ("copy", "Copy message"):
        page.evaluate("navigator.clipboard.writeText('')")
        page.locator("#pane-a").get_by_title(button, exact=True).last.click()
        page.wait_for_function("navigator.clipboard.readText().then((text) => text !== '')")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert written in copied
        assert "\N{WORD JOINER}" not in copied

    with page.context.expect_page() as opened:
        answer.locator("a", has_text="web").first.click()
    opened.value.close()
    answer.locator("a", has_text="mail").first.click()
    assert len(page.context.pages) == 1
    assert page.locator("#ask").is_visible()
    window.outside.clear()
    window.errors.clear()
