"""The page: its tabs and how their events reach the handlers; a tab is a class in a module of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; also stops its version check

import gradio as gr

from align.arena.battles import Arena
from align.arena.compare_tab import CompareTab
from align.arena.page_text import PAGE_TEXTS
from align.arena.result_tabs import ResultTabs
from align.arena.review_queue import ReviewQueue
from align.arena.review_tab import ReviewTab
from align.engine.protocol import Sampling
from align.registry import Registry

# Gradio 6.31 bundles web fonts of which some weights lack most letters, and none has Chinese: use the system's.
_FONTS = (
    "system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
    "WenQuanYi Micro Hei", "sans-serif",
)  # fmt: skip
_MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


@dataclass
class PageContents:
    """The compared models, their registry, and the default sampling."""

    arena: Arena
    registry: Registry
    sampling: Sampling
    seed: int | None = None
    queue: ReviewQueue | None = None
    """answers generated beforehand, judged in a tab of their own"""


def build_app(contents: PageContents) -> Any:
    """Return the page as an ASGI application of its own; it makes no request to other machines.

    The caller adds the security headers of `web.LocalPageGuard`.
    """
    from fastapi import FastAPI

    words = gr.I18n(**PAGE_TEXTS)
    page = _build_page(contents, words)
    page.queue(max_size=32, api_open=False)
    fonts, mono = ([gr.themes.Font(name) for name in names] for names in (_FONTS, _MONO_FONTS))
    sizes = {"radius_size": gr.themes.sizes.radius_md, "spacing_size": gr.themes.sizes.spacing_md}
    # The default grey of small print is too pale to read.
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=mono, **sizes).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
    css, js = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, path="/", theme=theme, css=css, js=js,
        i18n=words, footer_links=["settings"], run_history=False, enable_monitoring=False, ssr_mode=False,
        show_error=False, allowed_paths=[], max_file_size="1mb",
    )  # fmt: skip


def _build_page(contents: PageContents, words: Any) -> Any:
    """Lay the components out and connect their events."""
    arena, blind = contents.arena, contents.arena.setup.blind
    with gr.Blocks(title="align compare", analytics_enabled=False, fill_width=True) as page:
        # Filled in by the page's script with every event: the language shown, and a pseudonym.
        client = gr.Textbox(visible=False)
        with gr.Row(elem_id="top"):
            gr.Markdown("**align** compare", elem_id="brand")
            gr.Markdown(words("hint_blind" if blind else "hint_named"), elem_id="hint")
            gr.Button(words("help_button"), elem_id="help-button", size="sm")
        gr.Markdown(words("help_text"), elem_id="help")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(words("tab_compare"), id="compare"):
                compare = CompareTab(arena, contents.sampling, contents.seed, words)
            review = ReviewTab(contents.queue, arena.engine, words) if contents.queue else None
            results = ResultTabs(arena, contents.registry, words)
        tabs: list[CompareTab | ReviewTab] = [compare, review] if review else [compare]
        panels = [tab.panel for tab in tabs]
        if blind:
            for panel in panels:
                panel.name_parts = results.name_parts
        bind = partial(_bind, client)
        for tab in tabs:
            tab.connect(bind)
        results.connect(bind, panels)
    return page


def _bind(
    client: Any, triggers: list[Any], handler: Callable[..., Any], inputs: list[Any], outputs: list[Any], limit: int = 1
) -> None:
    """Call a handler, whose first argument is the client, on some triggers; the page's API description has no entry.

    No pane is an input: a vote judges what this process remembers, never what a browser sends back.
    """
    gr.on(
        triggers,
        handler,
        [client, *inputs],
        outputs,
        js=f"(...all) => [window.alignClient(), ...all.slice(1, {len(inputs) + 1})]",
        api_visibility="private",
        show_progress="hidden",
        concurrency_limit=limit,
    )
