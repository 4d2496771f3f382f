"""The page: layout and events. Handlers are in `handlers`, HTML in the views."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; also stops its version check

import gradio as gr

from align.arena.battle_panel import BattlePanel, lay_out_panel
from align.arena.battles import Arena
from align.arena.handlers import PanelHandlers, PromptHandlers, update_controls
from align.arena.page_assets import CSS, FONTS, JS, MONO_FONTS
from align.arena.page_text import PAGE_TEXTS
from align.arena.prompt_controls import PromptControls, SamplingDefaults, lay_out_controls
from align.arena.result_tabs import ResultTabHandlers, ResultTabs, empty_tabs, lay_out_result_tabs
from align.arena.review_queue import ReviewQueue
from align.arena.review_tab import ReviewHandlers, ReviewTab, lay_out_review_tab, update_progress
from align.engine.protocol import Engine, Sampling
from align.registry import Registry


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
    """Return the page as an ASGI application of its own; it makes no request to other machines."""
    from fastapi import FastAPI

    return mount_page(FastAPI(docs_url=None, redoc_url=None, openapi_url=None), contents, "/")


def mount_page(application: Any, contents: PageContents, path: str) -> Any:
    """Mount the page in a FastAPI application; the caller adds the security headers of `web.LocalPageGuard`."""
    words = gr.I18n(**PAGE_TEXTS)
    page = build_page(contents, words)
    page.queue(max_size=32, api_open=False)
    return gr.mount_gradio_app(
        application,
        page,
        path=path,
        theme=_theme(),
        css=CSS,
        js=JS,
        i18n=words,
        footer_links=["settings"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        show_error=False,
        allowed_paths=[],
        max_file_size="1mb",
    )


def _theme() -> Any:
    fonts, mono = ([gr.themes.Font(name) for name in names] for names in (FONTS, MONO_FONTS))
    sizes = {"radius_size": gr.themes.sizes.radius_md, "spacing_size": gr.themes.sizes.spacing_md}
    # The default grey of small print is too pale to read.
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=mono, **sizes).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


def build_page(contents: PageContents, words: Any) -> Any:
    """Lay the components out and connect their events."""
    setup = contents.arena.setup
    with gr.Blocks(title="align compare", analytics_enabled=False, fill_width=True) as page:
        # Filled in by the page's script with every event: the language shown, and a pseudonym.
        client = gr.Textbox(visible=False)
        with gr.Row(elem_id="top"):
            gr.Markdown("**align** compare", elem_id="brand")
            gr.Markdown(words("hint_blind" if setup.blind else "hint_named"), elem_id="hint")
            gr.Button(words("help_button"), elem_id="help-button", size="sm")
        gr.Markdown(words("help_text"), elem_id="help")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(words("tab_compare"), id="compare"):
                panel = lay_out_panel(setup, words)
                defaults = SamplingDefaults(contents.sampling, contents.seed, setup.blind)
                controls = lay_out_controls(panel, defaults, words)
            review = lay_out_review_tab(contents.queue, words) if contents.queue else None
            tabs = lay_out_result_tabs(words)
        panels = [panel, review.panel] if review else [panel]
        if setup.blind:
            for one in panels:
                one.name_parts = empty_tabs(tabs)
        bind = EventBinder(client)
        _connect(contents, panel, controls, bind)
        if review and contents.queue:
            _connect_review(contents.arena.engine, contents.queue, review, bind)
        _connect_result_tabs(ResultTabHandlers(contents.arena, contents.registry, tabs), tabs, bind, panels)
    return page


@dataclass
class EventBinder:
    """Connects events to handlers privately: without an entry in the page's API description.

    No pane is an input: a vote judges what this process remembers, never what a browser sends back.
    """

    client: Any

    def __call__(
        self, triggers: list[Any], handler: Any, inputs: list[Any], outputs: list[Any], limit: int = 1
    ) -> None:
        """Call a handler, whose first argument is the client, on some triggers."""
        gr.on(
            triggers,
            handler,
            [self.client, *inputs],
            outputs,
            js=f"(...all) => [window.alignClient(), ...all.slice(1, {len(inputs) + 1})]",
            api_visibility="private",
            show_progress="hidden",
            concurrency_limit=limit,
        )


def _connect(contents: PageContents, panel: BattlePanel, controls: PromptControls, bind: EventBinder) -> None:
    """Connect the events of the first tab."""
    arena = contents.arena
    panel_handlers = PanelHandlers(arena, arena.engine, panel, partial(update_controls, controls))
    handlers = PromptHandlers(arena, panel_handlers, controls, contents.sampling)
    outputs = [*panel.outputs, *controls.outputs]
    bind(
        [controls.ask.click, controls.prompt.submit],
        handlers.ask,
        [panel.state, controls.editing, controls.prompt, controls.system, *controls.settings],
        outputs,
        limit=16,
    )
    bind([controls.again.click], handlers.again, [panel.state, *controls.settings], outputs, limit=16)
    bind([controls.edit.click], handlers.edit, [panel.state], outputs)
    bind([controls.stop.click], handlers.stop, [panel.state], [])
    bind([controls.new.click], handlers.new, [panel.state], outputs)
    _connect_panel(panel_handlers, bind, outputs)


def _connect_panel(handlers: PanelHandlers, bind: EventBinder, outputs: list[Any]) -> None:
    """Connect the votes, token shift and differences of a panel."""
    panel = handlers.panel
    for choice, button in panel.votes.items():
        inputs = [panel.state, panel.nonce, panel.tags, panel.reason]
        bind([button.click], handlers.vote_handler(choice), inputs, outputs)
    bind([panel.shift_button.click], handlers.shift, [panel.state, panel.boxed], panel.outputs)
    bind([panel.difference_button.click], handlers.difference, [panel.state, panel.boxed], panel.outputs)


def _connect_review(engine: Engine, queue: ReviewQueue, review: ReviewTab, bind: EventBinder) -> None:
    """Connect the events of the review queue."""
    panel = review.panel
    panel_handlers = PanelHandlers(queue, engine, panel, partial(update_progress, queue, review))
    handlers = ReviewHandlers(queue, panel_handlers, review)
    outputs = [*panel.outputs, review.progress]
    bind([review.tab.select], handlers.opened, [panel.state], outputs)
    bind([review.next.click], handlers.next, [panel.state], outputs)
    _connect_panel(panel_handlers, bind, outputs)


def _connect_result_tabs(
    handlers: ResultTabHandlers, tabs: ResultTabs, bind: EventBinder, panels: list[BattlePanel]
) -> None:
    """Read the leaderboard and the models anew whenever their tab is opened."""
    states = [panel.state for panel in panels]
    bind([tabs.leaderboard_tab.select], handlers.leaderboard, states, [tabs.leaderboard])
    bind([tabs.models_tab.select], handlers.models, states, [tabs.pick, tabs.model])
    bind([tabs.pick.input], handlers.picked, [tabs.pick, *states], [tabs.model])
