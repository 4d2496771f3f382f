"""The review queue on the page: one comparison after another, of answers that were generated beforehand."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from align.arena import battle_view
from align.arena.battle_panel import BattlePanel, Changes
from align.arena.battles import Battle
from align.arena.page_text import Visitor, visitor_of
from align.arena.review_queue import ReviewQueue
from align.engine.protocol import Engine


class ReviewTab:
    """A panel, below it the progress and a button for the next comparison, and their handlers."""

    def __init__(self, queue: ReviewQueue, engine: Engine, words: Any) -> None:
        self._queue = queue
        with gr.Tab(words("tab_review"), id="review", elem_id="tab-review") as self.tab:
            self.panel = BattlePanel(queue, engine, words, self._update_progress, "review-")
            with gr.Row(elem_classes=["asking", "review-line"]):
                self.progress = gr.HTML("", elem_id="review-progress", elem_classes="flat", padding=False, scale=8)
                self.panel.difference_button.render()
                self.panel.shift_button.render()
                ids = {"elem_id": "review-next", "elem_classes": "next"}
                self.next_button = gr.Button(words("next"), **ids, variant="primary")

    def connect(self, bind: Callable[..., None]) -> None:
        """Connect the events."""
        outputs = [*self.panel.outputs, self.progress]
        bind([self.tab.select], self.opened, [self.panel.state], outputs)
        bind([self.next_button.click], self.next, [self.panel.state], outputs)
        self.panel.connect(bind, outputs)

    def opened(self, client: str, battle: Battle | None) -> Changes:
        """Show the first comparison; one that is open already stays."""
        return self.next(client, None) if battle is None else self.panel.unchanged()

    def next(self, client: str, battle: Battle | None) -> Changes:
        """Show the next comparison; one that was not judged comes again at the end."""
        visitor = visitor_of(client)
        if battle is not None and battle.phase != "voted":
            self._queue.skip(battle)
        next_battle = self._queue.next(visitor.voter)
        if next_battle is not None:
            return {**self.panel.hide_boxes(), **self.panel.show(next_battle, visitor)}
        written, wanted = self._queue.written
        text = visitor.words["queue_waiting" if written < wanted else "queue_done"]
        status = battle_view.status_line(text, "streaming" if written < wanted else "saved")
        return {**self._update_progress(None, visitor), self.panel.status: status}

    def _update_progress(self, _battle: Battle | None, visitor: Visitor) -> Changes:
        """Show the progress of generation and of this visitor's votes."""
        words, (done, total), (written, wanted) = (
            visitor.words,
            self._queue.progress(visitor.voter),
            self._queue.written,
        )
        share = 100 * done / total if total else 0
        writing = words["queue_written"].format(done=written, total=wanted) if written < wanted else words["queue_hint"]
        html = (
            '<div class="queue"><svg aria-hidden="true"><rect class="track" width="100%" height="8" rx="4"/>'
            f'<rect class="filled" width="{share:.1f}%" height="8" rx="4"/></svg>'
            f"<b>{escape(words['queue_voted'].format(done=done, total=total))}</b>"
            f'<span class="calm">{escape(writing)}</span></div>'
        )
        return {self.progress: html}
