"""The review queue on the page: one comparison after another, of answers that were generated beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from align.arena import battle_view
from align.arena.battle_panel import BattlePanel, Changes, lay_out_panel
from align.arena.battles import Battle
from align.arena.handlers import PanelHandlers
from align.arena.review_queue import ReviewQueue
from align.arena.visitor import Visitor, visitor_of


@dataclass
class ReviewTab:
    """The components of the review queue."""

    tab: Any
    panel: BattlePanel
    progress: Any
    next: Any


def lay_out_review_tab(queue: ReviewQueue, words: Any) -> ReviewTab:
    """Lay out the tab: a panel, and below it the progress and a button for the next comparison."""
    with gr.Tab(words("tab_review"), id="review", elem_id="tab-review") as tab:
        panel = lay_out_panel(queue.setup, words, "review-")
        with gr.Row(elem_classes=["asking", "review-line"]):
            progress = gr.HTML("", elem_id="review-progress", elem_classes="flat", padding=False, scale=8)
            panel.difference_button.render()
            panel.shift_button.render()
            next_button = gr.Button(words("next"), elem_id="review-next", elem_classes="next", variant="primary")
    return ReviewTab(tab, panel, progress, next_button)


def update_progress(queue: ReviewQueue, tab: ReviewTab, _battle: Battle | None, visitor: Visitor) -> Changes:
    """Return the progress of generation and of this visitor's votes."""
    words, (done, total), (written, wanted) = visitor.words, queue.progress(visitor.voter), queue.written
    share = 100 * done / total if total else 0
    writing = words["queue_written"].format(done=written, total=wanted) if written < wanted else words["queue_hint"]
    html = (
        '<div class="queue"><svg aria-hidden="true"><rect class="track" width="100%" height="8" rx="4"/>'
        f'<rect class="filled" width="{share:.1f}%" height="8" rx="4"/></svg>'
        f"<b>{escape(words['queue_voted'].format(done=done, total=total))}</b>"
        f'<span class="calm">{escape(writing)}</span></div>'
    )
    return {tab.progress: html}


class ReviewHandlers:
    """Handlers that lead from one comparison to the next."""

    def __init__(self, queue: ReviewQueue, panel: PanelHandlers, tab: ReviewTab) -> None:
        self._queue = queue
        self._panel = panel
        self._tab = tab

    def opened(self, client: str, battle: Battle | None) -> Changes:
        """Show the first comparison; one that is open already stays."""
        return self.next(client, None) if battle is None else self._panel.unchanged()

    def next(self, client: str, battle: Battle | None) -> Changes:
        """Show the next comparison; one that was not judged comes again at the end."""
        visitor = visitor_of(client)
        if battle is not None and battle.phase != "voted":
            self._queue.skip(battle)
        next_battle = self._queue.next(visitor.voter)
        if next_battle is not None:
            return {**self._panel.hide_boxes(), **self._panel.show(next_battle, visitor)}
        written, wanted = self._queue.written
        text = visitor.words["queue_waiting" if written < wanted else "queue_done"]
        return {
            **update_progress(self._queue, self._tab, None, visitor),
            self._panel.panel.status: battle_view.status_line(text, "streaming" if written < wanted else "saved"),
        }
