"""What happens when something on the page is clicked: asks the battle, and says which parts of the page changed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import gradio as gr

from align.arena import battle_view, token_shift_view
from align.arena.battles import FRAME_SECONDS, SCORE_SECONDS, ActionRefused, Arena, Battle, Setup, Turn
from align.arena.components import BattlePanel, Changes, PromptControls
from align.arena.visitor import Visitor, read_settings, visitor_of
from align.arena.vote_details import VoteDetails
from align.arena.word_difference import difference_legend, render_word_differences
from align.engine.protocol import Engine, Sampling
from align.errors import AlignError, MachineError, UsageError

MOST_LETTERS = 20_000
"""of a question or a system prompt; what a browser sends may be longer than its fields allow"""

_REDRAW_SECONDS = (0.3, 1.5)
"""Of two changes that reach gradio's page within one of the browser's frames only the later one counts, be it that
nothing changed. So what must not be lost is drawn again after a while."""
SETTLE_SECONDS = 3.0
"""for which a vote waits at most, already kept, for the last drawing of the answers that it stopped"""


class VoteSink(Protocol):
    """Where votes are kept: an arena, or a review queue."""

    @property
    def setup(self) -> Setup:
        """Who is compared."""
        ...

    def vote(self, battle: Battle | None, choice: str, nonce: str, details: VoteDetails) -> None:
        """Record a choice once; ActionRefused or MachineError otherwise."""
        ...


Around = Callable[[Battle, Visitor], Changes]


class PanelHandlers:
    """What can be done with answers that are there: judge them, and look into them."""

    def __init__(self, vote_sink: VoteSink, engine: Engine, board: BattlePanel, around: Around) -> None:
        """`around` says what else on the page changes with a battle of this board."""
        self.setup = vote_sink.setup
        self.board = board
        self._vote_sink = vote_sink
        self._engine = engine
        self._around = around

    def voter(self, choice: str) -> Callable[..., Changes]:
        """The handler of one vote button."""

        def vote(client: str, battle: Battle | None, nonce: str, tags: list[str] | None, reason: str | None) -> Changes:
            visitor = visitor_of(client)
            details = VoteDetails(reason or "", tuple(tags or ()), visitor.voter)
            try:
                self._vote_sink.vote(battle, choice, nonce, details)
            except ActionRefused as refusal:
                # The second half of a double click: what the first one showed stays.
                return self.same() if str(refusal) == "voted_already" else self.refuse(refusal, visitor)
            except MachineError as error:
                _settle(battle)
                return {self.board.status: battle_view.notice(str(error))}
            assert battle is not None
            _settle(battle)
            return self.drawn(battle, visitor)

        return vote

    def shift(self, client: str, battle: Battle | None, boxed: str) -> Iterator[Changes]:
        """Show what alignment changed in every answer, one forward pass an answer; or hide it again."""
        visitor, board = visitor_of(client), self.board
        if boxed == "shift":
            yield self.without_boxes()
            return
        if battle is None or battle.phase not in ("answered", "voted"):
            yield self.refuse(ActionRefused("nothing_to_shift"), visitor)
            return
        if battle_view.hides_names(battle, self.setup):
            yield self.refuse(ActionRefused("shift_hidden"), visitor)
            return
        yield {board.shift_button: gr.update(interactive=False)}
        try:
            boxes = [self._shift_of(battle, place, visitor) for place in range(len(battle.panes))]
        except AlignError as error:
            said = visitor.words["shift_none"].format(message=str(error))
            yield {board.status: battle_view.notice(said), board.shift_button: gr.update(interactive=True)}
            return
        shown = self._boxed("shift", token_shift_view.legend(visitor.words), boxes)
        yield {**shown, board.shift_button: gr.update(interactive=True)}

    def _shift_of(self, battle: Battle, place: int, visitor: Visitor) -> str:
        pane = battle.panes[place]
        ends = [end for end, message in enumerate(pane.messages, start=1) if message["role"] == "assistant"]
        model = pane.contestant.reference
        answers = [self._engine.token_shift(model, pane.messages[:end]) for end in ends]
        return token_shift_view.render_token_shift(answers, place, visitor.words)

    def difference(self, client: str, battle: Battle | None, boxed: str) -> Changes:
        """Show which words only one of two answers has, or hide it again; it tells nothing of the models."""
        visitor = visitor_of(client)
        if boxed == "words":
            return self.without_boxes()
        if battle is None or battle.phase not in ("answered", "voted") or len(battle.panes) != 2:
            return self.refuse(ActionRefused("nothing_to_shift"), visitor)
        boxes = render_word_differences([pane.answer for pane in battle.panes], visitor.words)
        return self._boxed("words", difference_legend(visitor.words), boxes)

    def _boxed(self, what: str, legend: str, boxes: list[str]) -> Changes:
        shown = {part: gr.update(value=box, visible=True) for part, box in zip(self.board.boxes, boxes, strict=True)}
        return {self.board.boxed: what, self.board.legend: gr.update(value=legend, visible=True), **shown}

    def drawn(self, battle: Battle, visitor: Visitor) -> Changes:
        """The whole board as a battle is now."""
        board, setup, fresh = self.board, self.setup, battle.phase in ("open", "streaming")
        hidden, ended = battle_view.hides_names(battle, setup), battle.phase in ("answered", "voted")
        panes = {
            part: gr.update(
                value=battle_view.pane_messages(pane, visitor.language),
                label=battle_view.pane_label(battle, place, setup),
            )
            for place, (part, pane) in enumerate(zip(board.panes, battle.panes, strict=True))
        }
        return {
            **panes,
            **(self.without_boxes() if fresh else {}),
            **self.pressable(battle, visitor),
            **({part: gr.update(**empty) for part, empty in board.secrets.items()} if hidden else {}),
            **({board.tags: [], board.reason: ""} if battle.phase == "voted" else {}),
            board.state: battle,
            board.nonce: battle.nonce,
            board.status: battle_view.status(battle, setup, visitor.language),
            board.shift_button: gr.update(interactive=not hidden and ended),
            board.difference_button: gr.update(interactive=ended),
        }

    def without_boxes(self) -> Changes:
        """The board with nothing below its panes."""
        parts = (*self.board.boxes, self.board.legend)
        return {self.board.boxed: "", **{part: gr.update(value="", visible=False) for part in parts}}

    def pressable(self, battle: Battle, visitor: Visitor) -> Changes:
        """The buttons that can be pressed as a battle is now, or cannot."""
        votes = {button: gr.update(interactive=battle.votable) for button in self.board.votes.values()}
        return {**self._around(battle, visitor), **votes}

    def same(self) -> Changes:
        """Nothing changes; gradio takes no empty answer."""
        return {self.board.status: gr.skip()}

    def refuse(self, refusal: Exception, visitor: Visitor) -> Changes:
        """The line below the panes, saying why not."""
        key = str(refusal) if isinstance(refusal, ActionRefused) else "bad_settings"
        return {self.board.status: battle_view.notice(visitor.words[key])}


def _settle(battle: Battle | None) -> None:
    """Wait until the last drawing of answers that a vote has stopped is on its way: it must not overtake the vote's."""
    if battle is not None and battle.settled is not None and not battle.settled.is_set():
        battle.settled.wait(SETTLE_SECONDS)
        time.sleep(FRAME_SECONDS)  # gradio still says that the handler has ended


class PromptHandlers:
    """What can be asked, over the board that shows the answers."""

    def __init__(self, arena: Arena, board: PanelHandlers, controls: PromptControls, usual: Sampling) -> None:
        self._board = board
        self._arena = arena
        self._asking = controls
        self._usual = usual
        self._followed: set[str] = set()
        """ids of the battles whose answers a visitor is looking at while they are written"""

    async def ask(
        self, client: str, battle: Battle | None, editing: bool, prompt: str, *told: Any
    ) -> AsyncIterator[Changes]:
        """Put a question to every pane; after a vote it opens a new battle."""
        visitor, (system, *settings) = visitor_of(client), told
        if battle is None or battle.phase == "voted":
            self._leave(battle)
            battle, editing = self._arena.new_battle(), False
        try:
            if max(len(prompt or ""), len(system or "")) > MOST_LETTERS:
                raise ActionRefused("too_long")
            turn = self._new_turn(settings)
            if editing and (prompt or "").strip():
                self._arena.ask_again(battle, turn, prompt)
            else:
                self._arena.ask(battle, prompt or "", turn, system or "")
        except (ActionRefused, UsageError) as refusal:
            yield self._board.refuse(refusal, visitor)
            return
        yield {**self._board.drawn(battle, visitor), self._asking.prompt: "", self._asking.editing: False}
        async for changes in self._follow(battle, visitor):
            yield changes

    def edit(self, client: str, battle: Battle | None) -> Changes:
        """Put the last question back into the field; what is asked next replaces it and its answers."""
        visitor = visitor_of(client)
        questions = [message for message in battle.panes[0].messages if message["role"] == "user"] if battle else []
        if battle is None or battle.phase not in ("answered", "failed") or not questions:
            return self._board.refuse(ActionRefused("nothing_to_edit"), visitor)
        return {
            self._asking.prompt: questions[-1]["content"],
            self._asking.editing: True,
            self._board.board.status: battle_view.notice(visitor.words["editing"], "editing"),
        }

    async def again(self, client: str, battle: Battle | None, *settings: Any) -> AsyncIterator[Changes]:
        """Write the last answers once more."""
        visitor = visitor_of(client)
        try:
            if battle is None:
                raise ActionRefused("nothing_to_regenerate")
            self._arena.ask_again(battle, self._new_turn(settings))
        except (ActionRefused, UsageError) as refusal:
            yield self._board.refuse(refusal, visitor)
            return
        yield {**self._board.drawn(battle, visitor), self._asking.editing: False}
        async for changes in self._follow(battle, visitor):
            yield changes

    def stop(self, _client: str, battle: Battle | None) -> None:
        """Stop the answers; the handler that follows them then ends as always."""
        self._arena.stop(battle)

    def new(self, client: str, battle: Battle | None) -> Changes:
        """Leave this battle without a vote and open another."""
        self._arena.stop(battle)
        self._leave(battle)
        return {**self._board.drawn(self._arena.new_battle(), visitor_of(client)), self._asking.editing: False}

    def _leave(self, battle: Battle | None) -> None:
        """Nothing more of this battle is drawn; the visitor looks at another one."""
        if battle is not None:
            self._followed.discard(battle.id)

    def _new_turn(self, settings: Sequence[Any]) -> Turn:
        return self._arena.new_turn(*read_settings(settings, self._usual))

    async def _follow(self, battle: Battle, visitor: Visitor) -> AsyncIterator[Changes]:
        """Draw a battle until its answers have ended."""
        self._followed.add(battle.id)
        settled = battle.settled = threading.Event()
        board, redraw, votable = self._board.board, list(_REDRAW_SECONDS), False
        began = time.monotonic()
        try:
            async for _ in self._arena.frames(battle):
                if battle.phase != "streaming" or battle.id not in self._followed:
                    continue
                now = time.monotonic() - began
                if battle.votable != votable:
                    votable, redraw = battle.votable, [now, *(now + later for later in _REDRAW_SECONDS)]
                if redraw and now >= redraw[0]:
                    redraw.pop(0)
                    yield self._board.drawn(battle, visitor)
                else:
                    panes = zip(board.panes, battle.panes, strict=True)
                    written = {part: battle_view.pane_messages(pane, visitor.language) for part, pane in panes}
                    yield {**written, **self._board.pressable(battle, visitor)}
            await self._scored(battle)
            if battle.id in self._followed:
                yield self._board.drawn(battle, visitor)
        finally:
            self._leave(battle)
            settled.set()

    async def _scored(self, battle: Battle) -> None:
        """Wait for the reward model where its scores are shown at once."""
        if battle.scoring is not None and not self._arena.setup.blind:
            with contextlib.suppress(TimeoutError):
                await asyncio.to_thread(battle.scoring.result, SCORE_SECONDS)


def buttons_around(controls: PromptControls, battle: Battle, _visitor: Visitor) -> Changes:
    """What can be asked next to a battle as it is now."""
    streaming = battle.phase == "streaming"
    return {
        controls.ask: gr.update(interactive=not streaming),
        controls.stop: gr.update(interactive=streaming),
        controls.again: gr.update(interactive=battle.phase in ("answered", "failed")),
        controls.edit: gr.update(interactive=battle.phase in ("answered", "failed")),
        controls.new: gr.update(interactive=not streaming),
    }
