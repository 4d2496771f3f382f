"""One comparison on the page: its components, and the handlers of finished answers: votes, token shift, differences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from align.arena import battle_view
from align.arena.battles import FRAME_SECONDS, ActionRefused, Arena, Battle, Setup
from align.arena.page_text import Visitor, visitor_of, vote_key
from align.arena.votes import LETTERS, MAX_REASON_CHARACTERS, TAGS, VoteDetails, choices
from align.errors import AlignError, MachineError

if TYPE_CHECKING:
    from align.arena.review_queue import ReviewQueue
    from align.engine.protocol import Engine

SETTLE_SECONDS = 3.0
"""longest wait of a vote, already stored, for the last redraw of the answers that it stopped"""

Changes = dict[Any, Any]
"""what a handler returns: new values by component; other components stay as they are"""
UpdateSurroundings = Callable[[Battle, Visitor], Changes]
"""returns the changes outside the panel that a change of its battle causes"""


class BattlePanel:
    """Panes, boxes below them, status line, votes and reasons; `prefix` begins the ids of a second panel."""

    def __init__(
        self,
        votes: Arena | ReviewQueue,
        engine: Engine,
        words: Any,
        update_around: UpdateSurroundings,
        prefix: str = "",
    ) -> None:
        setup = self.setup = votes.setup
        self._votes, self._engine, self._update_around = votes, engine, update_around
        self.name_parts: dict[Any, dict[str, Any]] = {}
        """components elsewhere that show model names, and the update that empties them while names are hidden"""
        self.state = gr.State(None)
        self.nonce = gr.Textbox(visible=False)
        """a vote must repeat it, so that a click sent twice judges nothing else"""
        self.boxed = gr.State("")
        """which boxes are shown below the panes: "shift", "words" or neither ("")"""
        with gr.Row(elem_id=f"{prefix}panes", elem_classes=["panes", "four"] if setup.panes > 2 else ["panes"]):
            columns = [_lay_out_pane(setup, index, words, prefix) for index in range(setup.panes)]
        self.panes, self.boxes = [pane for pane, _ in columns], [box for _, box in columns]
        self.legend = gr.HTML("", elem_classes="flat", visible=False, padding=False)
        self.status = gr.HTML("", elem_id=f"{prefix}status", elem_classes=["status", "flat"], padding=False)
        with gr.Row(elem_id=f"{prefix}votes", elem_classes="votes"):
            self.votes = {
                choice: gr.Button(
                    words(vote_key(choice, setup.panes)), elem_id=f"{prefix}vote-{choice}", interactive=False
                )
                for choice in choices(setup.panes)
            }
        with (
            gr.Accordion(words("why"), open=False, elem_id=f"{prefix}why", elem_classes="why") as self.why,
            gr.Row(elem_classes="more"),
        ):
            tags = [(words(f"tag_{tag}"), tag) for tag in TAGS]
            self.tags = gr.CheckboxGroup(tags, label=words("tags"), elem_id=f"{prefix}tags")
            self.reason = gr.Textbox(
                label=words("reason"), placeholder=words("reason_hint"), elem_id=f"{prefix}reason",
                lines=1, max_lines=3, max_length=MAX_REASON_CHARACTERS,
            )  # fmt: skip
        # The tab renders them where it wants them.
        self.shift_button, self.difference_button = (
            gr.Button(
                words(key), elem_id=f"{prefix}{key}", elem_classes=f"{key}-button", interactive=False, render=False,
                visible=key == "shift" or setup.panes == 2,
            )
            for key in ("shift", "difference")
        )  # fmt: skip

    @property
    def outputs(self) -> list[Any]:
        """Everything a handler of the panel may change."""
        below = [*self.boxes, self.boxed, self.legend, self.shift_button, self.difference_button]
        voting = [self.status, *self.votes.values(), self.why, self.tags, self.reason]
        return [self.state, self.nonce, *self.panes, *below, *voting, *self.name_parts]

    def connect(self, bind: Callable[..., None], outputs: list[Any]) -> None:
        """Connect the events; a vote may change `outputs`."""
        for choice, button in self.votes.items():
            bind([button.click], self.vote_handler(choice), [self.state, self.nonce, self.tags, self.reason], outputs)
        bind([self.shift_button.click], self.shift, [self.state, self.boxed], self.outputs)
        bind([self.difference_button.click], self.difference, [self.state, self.boxed], self.outputs)

    def vote_handler(self, choice: str) -> Callable[..., Changes]:
        """Return the handler of one vote button."""

        def vote(client: str, battle: Battle | None, nonce: str, tags: list[str] | None, reason: str | None) -> Changes:
            visitor = visitor_of(client)
            try:
                self._votes.vote(battle, choice, nonce, VoteDetails(reason or "", tuple(tags or ()), visitor.voter))
            except ActionRefused as refusal:
                # The second half of a double click: the page stays as the first one left it.
                return self.unchanged() if str(refusal) == "voted_already" else self.refuse(refusal, visitor)
            except MachineError as error:
                _wait_until_settled(battle)
                return {self.status: battle_view.status_line(str(error))}
            assert battle is not None
            _wait_until_settled(battle)
            return self.show(battle, visitor)

        return vote

    def shift(self, client: str, battle: Battle | None, boxed: str) -> Iterator[Changes]:
        """Show or hide the token shift of every answer, one forward pass each."""
        visitor = visitor_of(client)
        if boxed == "shift":
            yield self.hide_boxes()
            return
        if battle is None or battle.phase not in ("answered", "voted"):
            yield self.refuse(ActionRefused("nothing_to_shift"), visitor)
            return
        if battle_view.hides_names(battle, self.setup):
            yield self.refuse(ActionRefused("shift_hidden"), visitor)
            return
        yield {self.shift_button: gr.update(interactive=False)}
        try:
            boxes = [self._shift_html(battle, index, visitor) for index in range(len(battle.panes))]
            shown = self._show_boxes("shift", battle_view.token_shift_legend(visitor.words), boxes)
        except AlignError as error:
            shown = {self.status: battle_view.status_line(visitor.words["shift_none"].format(message=str(error)))}
        yield {**shown, self.shift_button: gr.update(interactive=True)}

    def _shift_html(self, battle: Battle, index: int, visitor: Visitor) -> str:
        pane = battle.panes[index]
        ends = [end for end, message in enumerate(pane.messages, start=1) if message["role"] == "assistant"]
        answers = [self._engine.token_shift(pane.contestant.reference, pane.messages[:end]) for end in ends]
        return battle_view.render_token_shift(answers, index, visitor.words)

    def difference(self, client: str, battle: Battle | None, boxed: str) -> Changes:
        """Show or hide the words that only one of two answers has; it reveals no model."""
        words = visitor_of(client).words
        if boxed == "words":
            return self.hide_boxes()
        if battle is None or battle.phase not in ("answered", "voted") or len(battle.panes) != 2:
            return self.refuse(ActionRefused("nothing_to_shift"), visitor_of(client))
        boxes = battle_view.render_word_differences([pane.answer for pane in battle.panes], words)
        return self._show_boxes("words", battle_view.difference_legend(words), boxes)

    def _show_boxes(self, kind: str, legend: str, boxes: list[str]) -> Changes:
        shown = {part: gr.update(value=box, visible=True) for part, box in zip(self.boxes, boxes, strict=True)}
        return {self.boxed: kind, self.legend: gr.update(value=legend, visible=True), **shown}

    def hide_boxes(self) -> Changes:
        """Hide the boxes below the panes."""
        hidden = {part: gr.update(value="", visible=False) for part in (*self.boxes, self.legend)}
        return {self.boxed: "", **hidden}

    def show(self, battle: Battle, visitor: Visitor) -> Changes:
        """Return the changes that show a battle as it is now."""
        hidden, ended = battle_view.hides_names(battle, self.setup), battle.phase in ("answered", "voted")
        panes = {
            part: gr.update(
                value=battle_view.pane_messages(pane, visitor.language),
                label=battle_view.pane_label(battle, index, self.setup),
            )
            for index, (part, pane) in enumerate(zip(self.panes, battle.panes, strict=True))
        }
        return {
            **panes,
            **(self.hide_boxes() if battle.phase in ("open", "streaming") else {}),
            **self.update_buttons(battle, visitor),
            **({part: gr.update(**empty) for part, empty in self.name_parts.items()} if hidden else {}),
            **({self.tags: [], self.reason: ""} if battle.phase == "voted" else {}),
            self.state: battle,
            self.nonce: battle.nonce,
            self.status: battle_view.status(battle, self.setup, visitor.language),
            self.shift_button: gr.update(interactive=not hidden and ended),
            self.difference_button: gr.update(interactive=ended),
        }

    def update_buttons(self, battle: Battle, visitor: Visitor) -> Changes:
        """Enable the buttons that a battle allows now."""
        votes = {button: gr.update(interactive=battle.votable) for button in self.votes.values()}
        return {**self._update_around(battle, visitor), **votes}

    def unchanged(self) -> Changes:
        """Return no change; gradio takes no empty answer."""
        return {self.status: gr.skip()}

    def refuse(self, refusal: Exception, visitor: Visitor) -> Changes:
        """Show why an action was refused."""
        key = str(refusal) if isinstance(refusal, ActionRefused) else "bad_settings"
        return {self.status: battle_view.status_line(visitor.words[key])}


def _lay_out_pane(setup: Setup, index: int, words: Any, prefix: str) -> tuple[Any, Any]:
    """Lay out a pane, and the box below it for its token shift or its word differences."""
    letter = LETTERS[index]
    with gr.Column(min_width=0):
        gr.Button(words("expand"), elem_id=f"{prefix}expand-{letter}", elem_classes="expand", size="sm")
        pane = gr.Chatbot(
            label=battle_view.pane_label(None, index, setup), elem_id=f"{prefix}pane-{letter}", elem_classes="pane",
            placeholder=words("empty_pane"), buttons=["copy"], feedback_options=None, layout="bubble",
            autoscroll=not prefix,  # a growing answer is followed, a finished one is read from its top
        )  # fmt: skip
        ids = {"elem_id": f"{prefix}shift-{letter}", "elem_classes": ["shift", "flat"]}
        return pane, gr.HTML("", **ids, visible=False, padding=False)


def _wait_until_settled(battle: Battle | None) -> None:
    """Wait until the last redraw of answers that a vote has stopped is sent: it must not overtake the vote's."""
    if battle is not None and battle.settled is not None and not battle.settled.is_set():
        battle.settled.wait(SETTLE_SECONDS)
        time.sleep(FRAME_SECONDS)  # gradio still sends that the handler has ended
