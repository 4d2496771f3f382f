"""Handlers of the page's events: call the arena and return the components that changed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import gradio as gr

from align.arena import battle_view, token_shift_view
from align.arena.battle_panel import BattlePanel, Changes
from align.arena.battles import FRAME_SECONDS, SCORE_SECONDS, ActionRefused, Arena, Battle, Setup, Turn
from align.arena.prompt_controls import MAX_PROMPT_CHARACTERS, PromptControls
from align.arena.visitor import Visitor, read_settings, visitor_of
from align.arena.vote_details import VoteDetails
from align.arena.word_difference import difference_legend, render_word_differences
from align.engine.protocol import Engine, Sampling
from align.errors import AlignError, MachineError, UsageError

_REDRAW_SECONDS = (0.3, 1.5)
"""Of two changes that reach gradio's page within one browser frame only the later counts, even one that changes
nothing. So a change that must not be lost is sent again after these delays."""
SETTLE_SECONDS = 3.0
"""longest wait of a vote, already stored, for the last redraw of the answers that it stopped"""


class VoteSink(Protocol):
    """Stores votes: an arena, or a review queue."""

    @property
    def setup(self) -> Setup:
        """The compared models."""
        ...

    def vote(self, battle: Battle | None, choice: str, nonce: str, details: VoteDetails) -> None:
        """Record a choice once; ActionRefused or MachineError otherwise."""
        ...


UpdateSurroundings = Callable[[Battle, Visitor], Changes]
"""returns the changes outside the panel that a change of its battle causes"""


class PanelHandlers:
    """Handlers of finished answers: votes, token shift and word differences."""

    def __init__(
        self, votes: VoteSink, engine: Engine, panel: BattlePanel, update_surroundings: UpdateSurroundings
    ) -> None:
        self.setup = votes.setup
        self.panel = panel
        self._votes = votes
        self._engine = engine
        self._update_surroundings = update_surroundings

    def vote_handler(self, choice: str) -> Callable[..., Changes]:
        """Return the handler of one vote button."""

        def vote(client: str, battle: Battle | None, nonce: str, tags: list[str] | None, reason: str | None) -> Changes:
            visitor = visitor_of(client)
            details = VoteDetails(reason or "", tuple(tags or ()), visitor.voter)
            try:
                self._votes.vote(battle, choice, nonce, details)
            except ActionRefused as refusal:
                # The second half of a double click: the page stays as the first one left it.
                return self.unchanged() if str(refusal) == "voted_already" else self.refuse(refusal, visitor)
            except MachineError as error:
                _wait_until_settled(battle)
                return {self.panel.status: battle_view.status_line(str(error))}
            assert battle is not None
            _wait_until_settled(battle)
            return self.show(battle, visitor)

        return vote

    def shift(self, client: str, battle: Battle | None, boxed: str) -> Iterator[Changes]:
        """Show or hide the token shift of every answer, one forward pass each."""
        visitor, panel = visitor_of(client), self.panel
        if boxed == "shift":
            yield self.hide_boxes()
            return
        if battle is None or battle.phase not in ("answered", "voted"):
            yield self.refuse(ActionRefused("nothing_to_shift"), visitor)
            return
        if battle_view.hides_names(battle, self.setup):
            yield self.refuse(ActionRefused("shift_hidden"), visitor)
            return
        yield {panel.shift_button: gr.update(interactive=False)}
        try:
            boxes = [self._shift_html(battle, index, visitor) for index in range(len(battle.panes))]
        except AlignError as error:
            text = visitor.words["shift_none"].format(message=str(error))
            yield {panel.status: battle_view.status_line(text), panel.shift_button: gr.update(interactive=True)}
            return
        shown = self._show_boxes("shift", token_shift_view.legend(visitor.words), boxes)
        yield {**shown, panel.shift_button: gr.update(interactive=True)}

    def _shift_html(self, battle: Battle, index: int, visitor: Visitor) -> str:
        pane = battle.panes[index]
        ends = [end for end, message in enumerate(pane.messages, start=1) if message["role"] == "assistant"]
        answers = [self._engine.token_shift(pane.contestant.reference, pane.messages[:end]) for end in ends]
        return token_shift_view.render_token_shift(answers, index, visitor.words)

    def difference(self, client: str, battle: Battle | None, boxed: str) -> Changes:
        """Show or hide the words that only one of two answers has; it reveals no model."""
        visitor = visitor_of(client)
        if boxed == "words":
            return self.hide_boxes()
        if battle is None or battle.phase not in ("answered", "voted") or len(battle.panes) != 2:
            return self.refuse(ActionRefused("nothing_to_shift"), visitor)
        boxes = render_word_differences([pane.answer for pane in battle.panes], visitor.words)
        return self._show_boxes("words", difference_legend(visitor.words), boxes)

    def _show_boxes(self, kind: str, legend: str, boxes: list[str]) -> Changes:
        shown = {part: gr.update(value=box, visible=True) for part, box in zip(self.panel.boxes, boxes, strict=True)}
        return {self.panel.boxed: kind, self.panel.legend: gr.update(value=legend, visible=True), **shown}

    def show(self, battle: Battle, visitor: Visitor) -> Changes:
        """Return the changes that show a battle as it is now."""
        panel, setup, fresh = self.panel, self.setup, battle.phase in ("open", "streaming")
        hidden, ended = battle_view.hides_names(battle, setup), battle.phase in ("answered", "voted")
        panes = {
            part: gr.update(
                value=battle_view.pane_messages(pane, visitor.language),
                label=battle_view.pane_label(battle, index, setup),
            )
            for index, (part, pane) in enumerate(zip(panel.panes, battle.panes, strict=True))
        }
        return {
            **panes,
            **(self.hide_boxes() if fresh else {}),
            **self.update_buttons(battle, visitor),
            **({part: gr.update(**empty) for part, empty in panel.name_parts.items()} if hidden else {}),
            **({panel.tags: [], panel.reason: ""} if battle.phase == "voted" else {}),
            panel.state: battle,
            panel.nonce: battle.nonce,
            panel.status: battle_view.status(battle, setup, visitor.language),
            panel.shift_button: gr.update(interactive=not hidden and ended),
            panel.difference_button: gr.update(interactive=ended),
        }

    def hide_boxes(self) -> Changes:
        """Hide the boxes below the panes."""
        parts = (*self.panel.boxes, self.panel.legend)
        return {self.panel.boxed: "", **{part: gr.update(value="", visible=False) for part in parts}}

    def update_buttons(self, battle: Battle, visitor: Visitor) -> Changes:
        """Enable the buttons that a battle allows now."""
        votes = {button: gr.update(interactive=battle.votable) for button in self.panel.votes.values()}
        return {**self._update_surroundings(battle, visitor), **votes}

    def unchanged(self) -> Changes:
        """Return no change; gradio takes no empty answer."""
        return {self.panel.status: gr.skip()}

    def refuse(self, refusal: Exception, visitor: Visitor) -> Changes:
        """Show why an action was refused."""
        key = str(refusal) if isinstance(refusal, ActionRefused) else "bad_settings"
        return {self.panel.status: battle_view.status_line(visitor.words[key])}


def _wait_until_settled(battle: Battle | None) -> None:
    """Wait until the last redraw of answers that a vote has stopped is sent: it must not overtake the vote's."""
    if battle is not None and battle.settled is not None and not battle.settled.is_set():
        battle.settled.wait(SETTLE_SECONDS)
        time.sleep(FRAME_SECONDS)  # gradio still sends that the handler has ended


class PromptHandlers:
    """Handlers of the prompt row, above the panel that shows the answers."""

    def __init__(self, arena: Arena, panel: PanelHandlers, controls: PromptControls, defaults: Sampling) -> None:
        self._panel = panel
        self._arena = arena
        self._controls = controls
        self._defaults = defaults
        self._watched: set[str] = set()
        """ids of the battles that a visitor is looking at while their answers are generated"""

    async def ask(
        self, client: str, battle: Battle | None, editing: bool, prompt: str, *fields: Any
    ) -> AsyncIterator[Changes]:
        """Ask every model a question; after a vote that opens a new battle."""
        visitor, (system, *settings) = visitor_of(client), fields
        if battle is None or battle.phase == "voted":
            self._leave(battle)
            battle, editing = self._arena.new_battle(), False
        try:
            if max(len(prompt or ""), len(system or "")) > MAX_PROMPT_CHARACTERS:
                raise ActionRefused("too_long")
            turn = self._new_turn(settings)
            if editing and (prompt or "").strip():
                self._arena.ask_again(battle, turn, prompt)
            else:
                self._arena.ask(battle, prompt or "", turn, system or "")
        except (ActionRefused, UsageError) as refusal:
            yield self._panel.refuse(refusal, visitor)
            return
        yield {**self._panel.show(battle, visitor), self._controls.prompt: "", self._controls.editing: False}
        async for changes in self._follow(battle, visitor):
            yield changes

    def edit(self, client: str, battle: Battle | None) -> Changes:
        """Put the last question back into the field; the next one replaces it and its answers."""
        visitor = visitor_of(client)
        questions = [message for message in battle.panes[0].messages if message["role"] == "user"] if battle else []
        if battle is None or battle.phase not in ("answered", "failed") or not questions:
            return self._panel.refuse(ActionRefused("nothing_to_edit"), visitor)
        return {
            self._controls.prompt: questions[-1]["content"],
            self._controls.editing: True,
            self._panel.panel.status: battle_view.status_line(visitor.words["editing"], "editing"),
        }

    async def again(self, client: str, battle: Battle | None, *settings: Any) -> AsyncIterator[Changes]:
        """Regenerate the last answers."""
        visitor = visitor_of(client)
        try:
            if battle is None:
                raise ActionRefused("nothing_to_regenerate")
            self._arena.ask_again(battle, self._new_turn(settings))
        except (ActionRefused, UsageError) as refusal:
            yield self._panel.refuse(refusal, visitor)
            return
        yield {**self._panel.show(battle, visitor), self._controls.editing: False}
        async for changes in self._follow(battle, visitor):
            yield changes

    def stop(self, _client: str, battle: Battle | None) -> None:
        """Stop the answers; the handler that follows them then ends as always."""
        self._arena.stop(battle)

    def new(self, client: str, battle: Battle | None) -> Changes:
        """Leave this battle without a vote and open another."""
        self._arena.stop(battle)
        self._leave(battle)
        return {**self._panel.show(self._arena.new_battle(), visitor_of(client)), self._controls.editing: False}

    def _leave(self, battle: Battle | None) -> None:
        """Stop redrawing a battle that the visitor no longer looks at."""
        if battle is not None:
            self._watched.discard(battle.id)

    def _new_turn(self, settings: Sequence[Any]) -> Turn:
        return self._arena.new_turn(*read_settings(settings, self._defaults))

    async def _follow(self, battle: Battle, visitor: Visitor) -> AsyncIterator[Changes]:
        """Redraw a battle until its answers have ended."""
        self._watched.add(battle.id)
        settled = battle.settled = threading.Event()
        panel, redraw, votable = self._panel.panel, list(_REDRAW_SECONDS), False
        began = time.monotonic()
        try:
            async for _ in self._arena.frames(battle):
                if battle.phase != "streaming" or battle.id not in self._watched:
                    continue
                now = time.monotonic() - began
                if battle.votable != votable:
                    votable, redraw = battle.votable, [now, *(now + later for later in _REDRAW_SECONDS)]
                if redraw and now >= redraw[0]:
                    redraw.pop(0)
                    yield self._panel.show(battle, visitor)
                else:
                    panes = zip(panel.panes, battle.panes, strict=True)
                    answers = {part: battle_view.pane_messages(pane, visitor.language) for part, pane in panes}
                    yield {**answers, **self._panel.update_buttons(battle, visitor)}
            await self._wait_for_scores(battle)
            if battle.id in self._watched:
                yield self._panel.show(battle, visitor)
        finally:
            self._leave(battle)
            settled.set()

    async def _wait_for_scores(self, battle: Battle) -> None:
        """Wait for the reward model where its scores are shown at once."""
        if battle.scoring is not None and not self._arena.setup.blind:
            with contextlib.suppress(TimeoutError):
                await asyncio.to_thread(battle.scoring.result, SCORE_SECONDS)


def update_controls(controls: PromptControls, battle: Battle, _visitor: Visitor) -> Changes:
    """Enable the buttons of the prompt row that a battle allows now."""
    streaming = battle.phase == "streaming"
    answered = gr.update(interactive=battle.phase in ("answered", "failed"))
    return {
        controls.ask: gr.update(interactive=not streaming),
        controls.stop: gr.update(interactive=streaming),
        controls.again: answered,
        controls.edit: answered,
        controls.new: gr.update(interactive=not streaming),
    }
