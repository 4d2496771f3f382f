"""Battles: who is compared with whom, what was said, when a vote counts and what it says. Knows no page."""

from __future__ import annotations

import random
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from align.arena.ballot import ballot_rows
from align.arena.votes import VoteStore
from align.engine.protocol import Engine, Event, GenerationRequest, Handle, Row, RowDelta, RowDone, Sampling
from align.schema import Message, Messages, assistant, user

FRAME_SECONDS = 0.05
"""A page that redraws for every token spends its time redrawing; twenty frames a second look as smooth."""

Phase = Literal["open", "streaming", "answered", "failed", "voted"]


class Refusal(Exception):
    """Something a visitor asked for that cannot be done now; its text is a key of the page's catalogue."""


@dataclass(frozen=True)
class Contestant:
    """A model that takes part, with the digest of its manifest."""

    reference: str
    digest: str | None = None


@dataclass(frozen=True)
class Setup:
    """What a page compares, for as long as it runs."""

    contestants: tuple[Contestant, ...]
    blind: bool
    base: dict[str, Any] = field(default_factory=dict)
    app_version: str = ""

    @property
    def panes(self) -> int:
        """Blind battles are between two; a named page shows everybody."""
        return 2 if self.blind else len(self.contestants)


@dataclass
class Turn:
    """How one answer was asked for, and what became of it in each pane."""

    sampling: Sampling
    seed: int
    regenerated: int = 0
    outcomes: list[RowDone | None] = field(default_factory=list)


@dataclass
class Pane:
    """One contestant's side of the conversation."""

    contestant: Contestant
    messages: Messages = field(default_factory=list)
    answer: str = ""
    done: RowDone | None = None
    error: str | None = None

    def shown(self) -> Messages:
        """The conversation with the answer as far as it has come, without the system turn."""
        growing = [assistant(self.answer)] if self.answer and self.done is None else []
        return [message for message in self.messages if message["role"] != "system"] + growing


@dataclass
class Battle:
    """One comparison, from the first question to the vote that closes it."""

    panes: list[Pane]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    phase: Phase = "open"
    turns: list[Turn] = field(default_factory=list)
    nonce: str = ""
    """what a vote must name: it is valid for these answers only, and once"""
    choice: str | None = None
    handle: Handle | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def votable(self) -> bool:
        """Whether every pane has an answer that nobody has judged yet."""
        return self.phase == "answered"

    def apply(self, event: Event) -> None:
        """Take in what the engine says about one pane."""
        pane = self.panes[event.row]
        if isinstance(event, RowDelta):
            pane.answer += event.text
        elif isinstance(event, RowDone):
            pane.answer, pane.done = event.text, event
            pane.messages.append(assistant(event.text))
        else:
            pane.error = event.message


class Arena:
    """Runs battles on an engine and keeps the votes. One for a page, shared by its visitors."""

    def __init__(self, engine: Engine, setup: Setup, votes: VoteStore, rng: random.Random | None = None) -> None:
        self.engine = engine
        self.setup = setup
        self.votes = votes
        self._rng = rng or random.SystemRandom()

    def new_battle(self) -> Battle:
        """Panes in the order given, or, when blind, two contestants drawn at random on random sides."""
        contestants = list(self.setup.contestants)
        if self.setup.blind:
            contestants = self._rng.sample(contestants, 2)
        return Battle([Pane(contestant) for contestant in contestants])

    def ask(self, battle: Battle, prompt: str, turn: Turn, system: str = "") -> None:
        """Put a question to every pane and start the answers."""
        if battle.phase == "streaming":
            raise Refusal("busy")
        if battle.phase == "failed":
            raise Refusal("failed")
        prompt, system = _clean(prompt), _clean(system)
        if not prompt:
            raise Refusal("empty")
        for pane in battle.panes:
            if system and not pane.messages:
                pane.messages.append(Message(role="system", content=system))
            pane.messages.append(user(prompt))
        self._start(battle, turn)

    def ask_again(self, battle: Battle, turn: Turn) -> None:
        """Take the last answers back and start new ones, from another seed if the same one was asked for."""
        if battle.phase not in ("answered", "failed"):
            raise Refusal("nothing_to_regenerate")
        for pane in battle.panes:
            if pane.messages[-1]["role"] == "assistant":
                pane.messages.pop()
        last = battle.turns.pop()
        turn.regenerated = last.regenerated + 1
        turn.seed += turn.regenerated
        self._start(battle, turn)

    def new_turn(self, sampling: Sampling, seed: int | None) -> Turn:
        """How the next answer is to be written; without a seed, one is drawn and recorded."""
        return Turn(sampling, self._rng.randrange(2**31) if seed is None else seed)

    def _start(self, battle: Battle, turn: Turn) -> None:
        for pane in battle.panes:
            pane.answer, pane.done, pane.error = "", None, None
        battle.turns.append(turn)
        battle.phase, battle.nonce = "streaming", ""
        rows = tuple(Row(pane.contestant.reference, list(pane.messages), turn.seed) for pane in battle.panes)
        battle.handle = self.engine.submit(GenerationRequest(rows, turn.sampling))

    async def frames(self, battle: Battle) -> AsyncIterator[None]:
        """Follow the answers of a battle, yielding whenever it is time to draw them again."""
        assert battle.handle is not None
        drawn = 0.0
        try:
            async for event in battle.handle.events():
                battle.apply(event)
                if time.monotonic() - drawn >= FRAME_SECONDS:
                    drawn = time.monotonic()
                    yield
        finally:
            self._settle(battle)

    def _settle(self, battle: Battle) -> None:
        """Close a turn whose answers have ended, or whose visitor has left."""
        battle.turns[-1].outcomes = [pane.done for pane in battle.panes]
        whole = all(pane.done is not None for pane in battle.panes)
        battle.phase = "answered" if whole else "failed"
        battle.nonce = uuid.uuid4().hex if whole else ""
        for pane in battle.panes:
            if pane.error is not None:
                sys.stderr.write(f"battle {battle.id}: {pane.error}\n")

    def stop(self, battle: Battle | None) -> None:
        """Stop all answers of a battle; what was written so far stays and can be voted on."""
        if battle is not None and battle.handle is not None:
            battle.handle.cancel()

    def vote(self, battle: Battle | None, choice: str, nonce: str) -> None:
        """Record a choice (a pane's letter, "tie" or "bad") once, and close the battle.

        Raises Refusal for a vote on answers that are not there, not these, or judged already; MachineError when the
        disk does not take it, after which the same vote may be given again.
        """
        if battle is None:
            raise Refusal("nothing_to_judge")
        with battle.lock:
            if battle.phase == "voted":
                raise Refusal("voted_already")
            if not battle.votable or nonce != battle.nonce:
                raise Refusal("nothing_to_judge")
            self.votes.append(ballot_rows(battle, choice, self.setup))
            battle.phase, battle.choice = "voted", choice


def _clean(text: str) -> str:
    """Text without lone surrogates, which browsers can send and no file can hold."""
    return text.strip().encode("utf-8", "replace").decode()
