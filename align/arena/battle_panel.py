"""One comparison on the page: how its parts are laid out."""

from __future__ import annotations

from typing import Any

import gradio as gr

from align.arena import battle_view
from align.arena.battles import Setup
from align.arena.components import BattlePanel
from align.arena.page_text import vote_key
from align.arena.vote_details import LETTERS, TAGS, choices

MOST_OF_A_REASON = 2000
"""characters"""


def lay_out_panel(setup: Setup, words: Any, prefix: str = "") -> BattlePanel:
    """Panes with what can be looked into below them, a line of status, the votes and the reasons for them.

    Ids begin with `prefix`, so that a page may have two boards.
    """
    state = gr.State(None)
    nonce = gr.Textbox(visible=False)
    boxed = gr.State("")
    with gr.Row(elem_id=f"{prefix}panes", elem_classes=["panes", "four"] if setup.panes > 2 else ["panes"]):
        columns = [_pane(setup, place, words, prefix) for place in range(setup.panes)]
    legend = gr.HTML("", elem_classes="flat", visible=False, padding=False)
    status = gr.HTML("", elem_id=f"{prefix}status", elem_classes=["status", "flat"], padding=False)
    with gr.Row(elem_id=f"{prefix}votes", elem_classes="votes"):
        votes = {
            choice: gr.Button(words(vote_key(choice, setup.panes)), elem_id=f"{prefix}vote-{choice}", interactive=False)
            for choice in choices(setup.panes)
        }
    with gr.Accordion(words("why"), open=False, elem_id=f"{prefix}why", elem_classes="why") as why:
        tags, reason = _why(words, prefix)
    shift = _look("shift", words, prefix)
    difference = _look("difference", words, prefix, visible=setup.panes == 2)
    panes, boxes = [pane for pane, _ in columns], [box for _, box in columns]
    return BattlePanel(state, nonce, panes, boxes, boxed, legend, shift, difference, status, votes, why, tags, reason)


def _look(key: str, words: Any, prefix: str, *, visible: bool = True) -> Any:
    """A button to look into the answers; it is placed where the page wants it."""
    told = {"elem_id": f"{prefix}{key}", "elem_classes": f"{key}-button"}
    return gr.Button(words(key), **told, interactive=False, visible=visible, render=False)


def _pane(setup: Setup, place: int, words: Any, prefix: str) -> tuple[Any, Any]:
    with gr.Column(min_width=0):
        gr.Button(words("expand"), elem_id=f"{prefix}expand-{LETTERS[place]}", elem_classes="expand", size="sm")
        pane = gr.Chatbot(
            label=battle_view.pane_label(None, place, setup),
            elem_id=f"{prefix}pane-{LETTERS[place]}",
            elem_classes="pane",
            placeholder=words("empty_pane"),
            buttons=["copy"],
            feedback_options=None,
            layout="bubble",
            autoscroll=not prefix,  # an answer that is being written is followed, one that is there read from its top
        )
        box = gr.HTML(
            "", elem_id=f"{prefix}shift-{LETTERS[place]}", elem_classes=["shift", "flat"], visible=False, padding=False
        )
    return pane, box


def _why(words: Any, prefix: str) -> tuple[Any, Any]:
    with gr.Row(elem_classes="more"):
        tags = gr.CheckboxGroup(
            [(words(f"tag_{tag}"), tag) for tag in TAGS], label=words("tags"), elem_id=f"{prefix}tags"
        )
        reason = gr.Textbox(
            label=words("reason"), placeholder=words("reason_hint"), elem_id=f"{prefix}reason",
            lines=1, max_lines=3, max_length=MOST_OF_A_REASON,
        )  # fmt: skip
    return tags, reason
