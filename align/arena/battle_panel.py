"""One comparison on the page: its components, and their layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from align.arena import battle_view
from align.arena.battles import Setup
from align.arena.page_text import vote_key
from align.arena.vote_details import LETTERS, MAX_REASON_CHARACTERS, TAGS, choices

Changes = dict[Any, Any]
"""what a handler returns: new values by component; other components stay as they are"""


@dataclass
class BattlePanel:
    """The components of one comparison, as handlers read and change them."""

    state: Any
    nonce: Any
    """a vote must repeat it, so that a click sent twice judges nothing else"""
    panes: list[Any]
    boxes: list[Any]
    """below the panes: the token shift or the word differences"""
    boxed: Any
    """which of the two is shown: "shift", "words" or neither ("")"""
    legend: Any
    shift_button: Any
    difference_button: Any
    status: Any
    votes: dict[str, Any]
    why: Any
    tags: Any
    reason: Any
    name_parts: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """components elsewhere that show model names, and the update that empties them while names are hidden"""

    @property
    def outputs(self) -> list[Any]:
        """Everything a handler of the panel may change."""
        below = [*self.boxes, self.boxed, self.legend, self.shift_button, self.difference_button]
        voting = [self.status, *self.votes.values(), self.why, self.tags, self.reason]
        return [self.state, self.nonce, *self.panes, *below, *voting, *self.name_parts]


def lay_out_panel(setup: Setup, words: Any, prefix: str = "") -> BattlePanel:
    """Lay out panes, boxes below them, status line, votes and reasons; `prefix` begins the ids of a second panel."""
    state = gr.State(None)
    nonce = gr.Textbox(visible=False)
    boxed = gr.State("")
    with gr.Row(elem_id=f"{prefix}panes", elem_classes=["panes", "four"] if setup.panes > 2 else ["panes"]):
        columns = [_lay_out_pane(setup, index, words, prefix) for index in range(setup.panes)]
    legend = gr.HTML("", elem_classes="flat", visible=False, padding=False)
    status = gr.HTML("", elem_id=f"{prefix}status", elem_classes=["status", "flat"], padding=False)
    with gr.Row(elem_id=f"{prefix}votes", elem_classes="votes"):
        votes = {
            choice: gr.Button(words(vote_key(choice, setup.panes)), elem_id=f"{prefix}vote-{choice}", interactive=False)
            for choice in choices(setup.panes)
        }
    with (
        gr.Accordion(words("why"), open=False, elem_id=f"{prefix}why", elem_classes="why") as why,
        gr.Row(elem_classes="more"),
    ):
        tags = gr.CheckboxGroup(
            [(words(f"tag_{tag}"), tag) for tag in TAGS], label=words("tags"), elem_id=f"{prefix}tags"
        )
        reason = gr.Textbox(
            label=words("reason"), placeholder=words("reason_hint"), elem_id=f"{prefix}reason",
            lines=1, max_lines=3, max_length=MAX_REASON_CHARACTERS,
        )  # fmt: skip
    shift = _unplaced_button("shift", words, prefix)
    difference = _unplaced_button("difference", words, prefix, visible=setup.panes == 2)
    panes, boxes = [pane for pane, _ in columns], [box for _, box in columns]
    return BattlePanel(state, nonce, panes, boxes, boxed, legend, shift, difference, status, votes, why, tags, reason)


def _unplaced_button(key: str, words: Any, prefix: str, *, visible: bool = True) -> Any:
    """Return a button that the page renders where it wants it."""
    ids = {"elem_id": f"{prefix}{key}", "elem_classes": f"{key}-button"}
    return gr.Button(words(key), **ids, interactive=False, visible=visible, render=False)


def _lay_out_pane(setup: Setup, index: int, words: Any, prefix: str) -> tuple[Any, Any]:
    with gr.Column(min_width=0):
        gr.Button(words("expand"), elem_id=f"{prefix}expand-{LETTERS[index]}", elem_classes="expand", size="sm")
        pane = gr.Chatbot(
            label=battle_view.pane_label(None, index, setup),
            elem_id=f"{prefix}pane-{LETTERS[index]}",
            elem_classes="pane",
            placeholder=words("empty_pane"),
            buttons=["copy"],
            feedback_options=None,
            layout="bubble",
            autoscroll=not prefix,  # a growing answer is followed, a finished one is read from its top
        )
        box = gr.HTML(
            "", elem_id=f"{prefix}shift-{LETTERS[index]}", elem_classes=["shift", "flat"], visible=False, padding=False
        )
    return pane, box
