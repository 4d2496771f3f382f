"""The page: layout and wiring only. What happens is in `handlers`, what is shown in `view`."""

from __future__ import annotations

import os
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; also stops its version check

import gradio as gr

from align.arena import view
from align.arena.ballot import choices
from align.arena.battles import Arena
from align.arena.handlers import Handlers, Parts
from align.arena.style import CSS, FONTS, JS, MONO_FONTS
from align.arena.text import CATALOGUE, vote_key
from align.engine.protocol import Sampling


def build_app(arena: Arena, sampling: Sampling, seed: int | None = None) -> Any:
    """The page as an ASGI application; nothing in it calls any other machine."""
    from fastapi import FastAPI

    words = gr.I18n(**CATALOGUE)
    page = build_page(arena, words, sampling, seed)
    page.queue(max_size=32, api_open=False)
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
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
    # The default grey of small print is too pale to read.
    return gr.themes.Default(font=fonts, font_mono=mono).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


def build_page(arena: Arena, words: Any, sampling: Sampling, seed: int | None) -> Any:
    """Lay the components out and connect them."""
    with gr.Blocks(title="align compare", analytics_enabled=False, fill_width=True) as page:
        parts = _lay_out(arena, words, sampling, seed)
        _connect(Handlers(arena, parts), parts)
    return page


def _lay_out(arena: Arena, words: Any, sampling: Sampling, seed: int | None) -> Parts:
    setup = arena.setup
    state = gr.State(None)
    # A click carries the nonce of what it was made for, so a click sent again later judges nothing else.
    nonce = gr.Textbox(visible=False)
    gr.Markdown(words("hint_blind" if setup.blind else "hint_named"), elem_id="head")
    with gr.Row(elem_id="panes", equal_height=True):
        panes = [_pane(view.pane_label(None, place, setup), place) for place in range(setup.panes)]
    status = gr.HTML("", elem_id="status", padding=False)
    with gr.Row(elem_id="votes"):
        votes = {
            choice: gr.Button(words(vote_key(choice, setup.panes)), elem_id=f"vote-{choice}", interactive=False)
            for choice in choices(setup.panes)
        }
    with gr.Row(elem_id="asking"):
        prompt = gr.Textbox(
            show_label=False, container=False, placeholder=words("prompt"), elem_id="prompt",
            lines=1, max_lines=6, max_length=20_000, scale=8, autofocus=True,
        )  # fmt: skip
        ask = gr.Button(words("ask"), variant="primary", elem_id="ask", scale=1)
        stop = gr.Button(words("stop"), variant="stop", elem_id="stop", scale=1, interactive=False)
        again = gr.Button(words("again"), elem_id="again", scale=1, interactive=False)
        new = gr.Button(words("new"), elem_id="new", scale=1)
    with gr.Accordion(words("settings"), open=False, elem_id="sampling"):
        settings = _settings(words, sampling, seed)
        system = gr.Textbox("", label=words("system"), info=words("system_info"), lines=1, max_lines=4)
    return Parts(state, nonce, panes, status, votes, prompt, ask, stop, again, new, settings, system)


def _pane(label: str, place: int) -> Any:
    return gr.Chatbot(
        label=label,
        elem_id=f"pane-{'abcd'[place]}",
        elem_classes="pane",
        buttons=["copy"],
        feedback_options=None,
        layout="bubble",
    )


def _settings(words: Any, sampling: Sampling, seed: int | None) -> list[Any]:
    most = max(1024, sampling.max_new_tokens)
    with gr.Row():
        return [
            _slider(words, "temperature", (0, 2, 0.05), sampling.temperature),
            _slider(words, "top_p", (0.05, 1, 0.05), sampling.top_p),
            _slider(words, "max_new_tokens", (1, most, 1), sampling.max_new_tokens),
            # A Number without a value shows, and sends, 0.
            gr.Textbox("" if seed is None else str(seed), label=words("seed"), info=words("seed_info"), elem_id="seed"),
        ]


def _slider(words: Any, key: str, scale: tuple[float, float, float], value: float) -> Any:
    low, high, step = scale
    return gr.Slider(low, high, value, step=step, label=words(key), info=words(f"{key}_info"))


def _connect(handlers: Handlers, parts: Parts) -> None:
    # Private events have no entry in the page's API description, and no panes are inputs: what is judged is what this
    # process remembers, never what a browser sends back.
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    writing = {**quiet, "concurrency_limit": 16}
    gr.on(
        [parts.ask.click, parts.prompt.submit],
        handlers.ask,
        [parts.state, parts.prompt, parts.system, *parts.settings],
        parts.outputs,
        **writing,
    )
    parts.again.click(handlers.again, [parts.state, *parts.settings], parts.outputs, **writing)
    parts.stop.click(handlers.stop, parts.state, None, **quiet)
    parts.new.click(handlers.new, parts.state, parts.outputs, **quiet)
    for choice, button in parts.votes.items():
        button.click(handlers.voter(choice), [parts.state, parts.nonce], parts.outputs, **quiet)
