"""The page: layout and wiring only. What happens is in `handlers`, what is shown in `battle_view`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; also stops its version check

import gradio as gr

from align.arena.battle_panel import lay_out_panel
from align.arena.battles import Arena
from align.arena.components import BattlePanel, PromptControls, ResultTabs, ReviewControls
from align.arena.handlers import MOST_LETTERS, PanelHandlers, PromptHandlers, buttons_around
from align.arena.page_assets import CSS, FONTS, JS, MONO_FONTS
from align.arena.page_text import PAGE_TEXTS
from align.arena.result_tabs import ResultTabHandlers, emptied, lay_out_result_tabs
from align.arena.review_queue import ReviewQueue
from align.arena.review_tab import ReviewHandlers, lay_out_review_controls, progress_around
from align.engine.protocol import Engine, Sampling
from align.registry import Registry


@dataclass
class PageContents:
    """What a page is about: its battles, the models behind them, and how it asks unless told otherwise."""

    arena: Arena
    registry: Registry
    sampling: Sampling
    seed: int | None = None
    queue: ReviewQueue | None = None
    """answers written beforehand, to be judged in a tab of their own"""


def build_app(contents: PageContents) -> Any:
    """The page as an ASGI application of its own; nothing in it calls any other machine."""
    from fastapi import FastAPI

    return mount_page(FastAPI(docs_url=None, redoc_url=None, openapi_url=None), contents, "/")


def mount_page(application: Any, contents: PageContents, path: str) -> Any:
    """Put the page under a path of a FastAPI application; the caller adds the security headers of `web.Guard`."""
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
    """Lay the components out and connect them."""
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
                board = lay_out_panel(setup, words)
                controls = _lay_out_controls(board, contents, words)
            reviewing = _lay_out_review(contents.queue, words) if contents.queue else None
            sheets, tabs = lay_out_result_tabs(words)
        boards = [board, reviewing.board] if reviewing else [board]
        if setup.blind:
            for one in boards:
                one.secrets = emptied(sheets)
        bind = EventBinder(client)
        _connect(contents, board, controls, bind)
        if reviewing and contents.queue:
            _connect_review(contents.arena.engine, contents.queue, reviewing, bind)
        _connect_result_tabs(ResultTabHandlers(contents.arena, contents.registry, sheets), sheets, tabs, bind, boards)
    return page


@dataclass
class _Review:
    board: BattlePanel
    parts: ReviewControls
    tab: Any


def _lay_out_review(queue: ReviewQueue, words: Any) -> _Review:
    with gr.Tab(words("tab_review"), id="review", elem_id="tab-review") as tab:
        board = lay_out_panel(queue.setup, words, "review-")
        parts = lay_out_review_controls(board, words)
    return _Review(board, parts, tab)


def _lay_out_controls(board: BattlePanel, contents: PageContents, words: Any) -> PromptControls:
    with gr.Row(elem_id="asking", elem_classes="asking"):
        prompt = gr.Textbox(
            label=words("prompt_label"), show_label=False, container=False, placeholder=words("prompt"),
            elem_id="prompt", lines=1, max_lines=6, max_length=MOST_LETTERS, scale=8, autofocus=True,
        )  # fmt: skip
        ask = gr.Button(words("ask"), variant="primary", elem_id="ask", scale=1)
        stop = gr.Button(words("stop"), variant="stop", elem_id="stop", scale=1, interactive=False)
        again = gr.Button(words("again"), elem_id="again", scale=1, interactive=False)
        edit = gr.Button(words("edit"), elem_id="edit", scale=1, interactive=False)
        board.difference_button.render()
        board.shift_button.render()
        new = gr.Button(words("new"), elem_id="new", elem_classes="next", scale=1)
    with gr.Accordion(words("settings"), open=False, elem_id="sampling", elem_classes="settings"):
        settings = _settings(words, contents)
        system = gr.Textbox(
            "", label=words("system"), info=words("system_info"), lines=1, max_lines=4, elem_id="system"
        )
        follow = gr.Checkbox(True, label=words("follow"), info=words("follow_info"), elem_id="follow")
        follow.change(
            lambda followed: [gr.update(autoscroll=followed)] * len(board.panes), follow, board.panes,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
    return PromptControls(prompt, ask, stop, again, edit, gr.State(False), new, settings, system)


def _settings(words: Any, contents: PageContents) -> list[Any]:
    sampling, seed = contents.sampling, contents.seed
    seed_info = "seed_blind_info" if contents.arena.setup.blind else "seed_info"
    most = max(1024, sampling.max_new_tokens)
    with gr.Row(elem_classes="row"):
        drawing = [
            _slider(words, "temperature", (0, 2, 0.05), sampling.temperature),
            _slider(words, "top_p", (0.05, 1, 0.05), sampling.top_p),
            _slider(words, "top_k", (0, max(200, sampling.top_k), 1), sampling.top_k),
            _slider(words, "min_p", (0, 1, 0.01), sampling.min_p),
        ]
    with gr.Row(elem_classes="row"):
        return [
            *drawing,
            _slider(words, "repetition_penalty", (0.5, 2, 0.05), sampling.repetition_penalty),
            _slider(words, "max_new_tokens", (1, most, 1), sampling.max_new_tokens),
            # A Number without a value shows, and sends, 0.
            gr.Textbox(
                "" if seed is None else str(seed), label=words("seed"), info=words(seed_info),
                placeholder=words("seed_hint"), elem_id="seed", max_length=18,
            ),
        ]  # fmt: skip


def _slider(words: Any, key: str, scale: tuple[float, float, float], value: float) -> Any:
    low, high, step = scale
    return gr.Slider(
        low, high, value, step=step, label=words(key), info=words(f"{key}_info"), elem_id=key, min_width=200
    )


@dataclass
class EventBinder:
    """Connects events to handlers, all of them privately.

    Private events have no entry in the page's API description, and no panes are inputs: what is judged is what this
    process remembers, never what a browser sends back.
    """

    client: Any

    def __call__(
        self, triggers: list[Any], handler: Any, inputs: list[Any], outputs: list[Any], limit: int = 1
    ) -> None:
        """Have a handler, whose first argument is the client, answer some triggers."""
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


def _connect(contents: PageContents, board: BattlePanel, controls: PromptControls, bind: EventBinder) -> None:
    """Everything that happens on the first tab."""
    arena = contents.arena
    judging = PanelHandlers(arena, arena.engine, board, partial(buttons_around, controls))
    handlers = PromptHandlers(arena, judging, controls, contents.sampling)
    outputs = [*board.outputs, *controls.outputs]
    bind(
        [controls.ask.click, controls.prompt.submit],
        handlers.ask,
        [board.state, controls.editing, controls.prompt, controls.system, *controls.settings],
        outputs,
        limit=16,
    )
    bind([controls.again.click], handlers.again, [board.state, *controls.settings], outputs, limit=16)
    bind([controls.edit.click], handlers.edit, [board.state], outputs)
    bind([controls.stop.click], handlers.stop, [board.state], [])
    bind([controls.new.click], handlers.new, [board.state], outputs)
    connect_panel(judging, bind, outputs)


def connect_panel(handlers: PanelHandlers, bind: EventBinder, outputs: list[Any]) -> None:
    """Votes, and what can be looked into, wherever the board is."""
    board = handlers.board
    for choice, button in board.votes.items():
        inputs = [board.state, board.nonce, board.tags, board.reason]
        bind([button.click], handlers.voter(choice), inputs, outputs)
    bind([board.shift_button.click], handlers.shift, [board.state, board.boxed], board.outputs)
    bind([board.difference_button.click], handlers.difference, [board.state, board.boxed], board.outputs)


def _connect_review(engine: Engine, queue: ReviewQueue, review: _Review, bind: EventBinder) -> None:
    """Everything that happens in the review queue."""
    board, parts = review.board, review.parts
    judging = PanelHandlers(queue, engine, board, partial(progress_around, queue, parts))
    handlers = ReviewHandlers(queue, judging, parts)
    outputs = [*board.outputs, parts.progress]
    bind([review.tab.select], handlers.opened, [board.state], outputs)
    bind([parts.next.click], handlers.next, [board.state], outputs)
    connect_panel(judging, bind, outputs)


def _connect_result_tabs(
    handlers: ResultTabHandlers, sheets: ResultTabs, tabs: tuple[Any, Any], bind: EventBinder, boards: list[BattlePanel]
) -> None:
    """Standings and models are read anew whenever they are opened."""
    states = [board.state for board in boards]
    standings_tab, models_tab = tabs
    bind([standings_tab.select], handlers.standings, states, [sheets.standings])
    bind([models_tab.select], handlers.models, states, [sheets.pick, sheets.model])
    bind([sheets.pick.input], handlers.picked, [sheets.pick, *states], [sheets.model])
