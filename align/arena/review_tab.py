"""The review queue on the page: one comparison after the other, of answers that were written beforehand."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from align.arena import battle_view
from align.arena.battles import Battle
from align.arena.components import BattlePanel, Changes, ReviewControls
from align.arena.handlers import PanelHandlers
from align.arena.review_queue import ReviewQueue
from align.arena.visitor import Visitor, visitor_of


def lay_out_review_controls(board: BattlePanel, words: Any) -> ReviewControls:
    """The line that leads through the queue, below its board."""
    with gr.Row(elem_classes=["asking", "review-line"]):
        progress = gr.HTML("", elem_id="review-progress", elem_classes="flat", padding=False, scale=8)
        board.difference_button.render()
        board.shift_button.render()
        following = gr.Button(words("next"), elem_id="review-next", elem_classes="next", variant="primary")
    return ReviewControls(progress, following)


def progress_around(queue: ReviewQueue, parts: ReviewControls, _battle: Battle | None, visitor: Visitor) -> Changes:
    """How far the queue is written, and how far this visitor has come."""
    words, (done, total), (written, wanted) = visitor.words, queue.progress(visitor.voter), queue.written
    share = 100 * done / total if total else 0
    writing = words["queue_written"].format(done=written, total=wanted) if written < wanted else words["queue_hint"]
    told = (
        '<div class="queue"><svg aria-hidden="true"><rect class="track" width="100%" height="8" rx="4"/>'
        f'<rect class="filled" width="{share:.1f}%" height="8" rx="4"/></svg>'
        f"<b>{escape(words['queue_voted'].format(done=done, total=total))}</b>"
        f'<span class="calm">{escape(writing)}</span></div>'
    )
    return {parts.progress: told}


class ReviewHandlers:
    """What leads from one comparison to the next."""

    def __init__(self, queue: ReviewQueue, board: PanelHandlers, parts: ReviewControls) -> None:
        self._queue = queue
        self._board = board
        self._parts = parts

    def opened(self, client: str, battle: Battle | None) -> Changes:
        """The first comparison; one that is open already stays."""
        return self.next(client, None) if battle is None else self._board.same()

    def next(self, client: str, battle: Battle | None) -> Changes:
        """The next comparison; one that was not judged comes again at the end."""
        visitor = visitor_of(client)
        if battle is not None and battle.phase != "voted":
            self._queue.skip(battle)
        following = self._queue.next(visitor.voter)
        if following is not None:
            return {**self._board.without_boxes(), **self._board.drawn(following, visitor)}
        written, wanted = self._queue.written
        said = visitor.words["queue_waiting" if written < wanted else "queue_done"]
        return {
            **progress_around(self._queue, self._parts, None, visitor),
            self._board.board.status: battle_view.notice(said, "streaming" if written < wanted else "saved"),
        }
