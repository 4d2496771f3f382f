"""Battles: who is compared with whom, what was said, when a vote counts and what it says. Knows no page."""

from __future__ import annotations

import hashlib
import random
import secrets
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal

from align.arena.vote_details import NO_DETAILS, VoteDetails, build_vote_rows, clean
from align.arena.votes import VoteStore
from align.engine.protocol import (
    Engine,
    EngineBusy,
    Event,
    GenerationRequest,
    Handle,
    Row,
    RowDelta,
    RowDone,
    RowFailure,
    Sampling,
)
from align.schema import Message, Messages, assistant, user

FRAME_SECONDS = 0.05
"""A page that redraws for every token spends its time redrawing; twenty frames a second look as smooth."""
SCORE_SECONDS = 2.0
"""How long a vote waits for the reward model's scores before it is kept without them."""

Phase = Literal["open", "streaming", "answered", "failed", "voted"]


class ActionRefused(Exception):
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
    reward: Contestant | None = None
    """the reward model the engine holds beside the contestants"""

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
    truncated: bool = False
    """whether any of the answers was stopped before its end"""
    scores: list[float | None] = field(default_factory=list)
    """the reward model's, where there is one and it had time"""


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
        ended = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        growing = [assistant(self.answer)] if self.answer and not ended else []
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
    scoring: Future[None] | None = None
    review: dict[str, Any] | None = None
    """which item of which review queue this is; nothing more is asked in one"""
    salt: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    """drawn for this battle alone and never sent to a browser; mixed into the seed of blind answers"""
    lock: threading.RLock = field(default_factory=threading.RLock)
    settled: threading.Event | None = None
    """set once the answers are not drawn any more; None when nobody ever drew them while they were written"""

    @property
    def votable(self) -> bool:
        """Whether every pane has an answer, be it an unfinished one, that nobody has judged yet."""
        if self.phase == "streaming":
            return all(pane.error is None and pane.answer.strip() for pane in self.panes)
        return self.phase == "answered"

    def apply(self, event: Event, turn: Turn) -> None:
        """Take in what the engine says about one pane's answer in a turn; too late, it changes no answer."""
        with self.lock:
            if turn is not self.turns[-1]:
                return
            pane = self.panes[event.row]
            if self.phase != "streaming":
                if isinstance(event, RowDone):
                    turn.outcomes[event.row] = event
            elif isinstance(event, RowDelta):
                pane.answer += event.text
            elif isinstance(event, RowDone):
                pane.answer, pane.done = event.text, event
                pane.messages.append(assistant(event.text))
            elif isinstance(event, RowFailure):
                pane.error = event.message

    def end_turn(self, turn: Turn) -> bool:
        """Close the answers of a turn as they are now; False when that was done before."""
        with self.lock:
            if turn is not self.turns[-1] or self.phase != "streaming":
                return False
            turn.outcomes = [pane.done for pane in self.panes]
            turn.truncated = any(done is None or done.reason == "cancelled" for done in turn.outcomes)
            for pane in self.panes:
                if pane.done is None and pane.error is None and pane.answer.strip():
                    pane.messages.append(assistant(pane.answer))
            whole = all(pane.messages[-1]["role"] == "assistant" for pane in self.panes)
            self.phase = "answered" if whole else "failed"
            self.nonce = self.nonce if whole else ""
            return True


class Arena:
    """Runs battles on an engine and keeps the votes. One for a page, shared by its visitors."""

    def __init__(self, engine: Engine, setup: Setup, votes: VoteStore, rng: random.Random | None = None) -> None:
        self.engine = engine
        self.setup = setup
        self.votes = votes
        self._rng = rng or random.SystemRandom()
        self._scorer = ThreadPoolExecutor(1, "scores")

    def new_battle(self) -> Battle:
        """Panes in the order given, or, when blind, two contestants drawn at random on random sides."""
        contestants = list(self.setup.contestants)
        if self.setup.blind:
            contestants = self._rng.sample(contestants, 2)
        return Battle([Pane(contestant) for contestant in contestants])

    def ask(self, battle: Battle, prompt: str, turn: Turn, system: str = "") -> None:
        """Put a question to every pane and start the answers."""
        refused = {"streaming": "busy", "failed": "failed", "voted": "voted_already"}.get(battle.phase)
        if battle.review is not None or refused:
            raise ActionRefused(refused or "review")
        prompt, system = clean(prompt), clean(system)
        if not prompt:
            raise ActionRefused("empty")
        question = [user(prompt)]
        if system and not battle.turns:
            question.insert(0, Message(role="system", content=system))
        self._start(battle, turn, [[*pane.messages, *question] for pane in battle.panes])

    def ask_again(self, battle: Battle, turn: Turn, prompt: str = "") -> None:
        """Take the last answers back and start new ones, from another seed if the same one was asked for.

        With a `prompt`, that is asked in place of the last question.
        """
        if battle.phase not in ("answered", "failed"):
            raise ActionRefused("nothing_to_regenerate")
        if battle.review is not None:
            raise ActionRefused("review")
        turn.regenerated = battle.turns[-1].regenerated + 1
        asked = [_before_answer(pane.messages) for pane in battle.panes]
        if prompt := clean(prompt):
            asked = [[*messages[:-1], user(prompt)] for messages in asked]
        else:
            turn.seed += turn.regenerated
        self._start(battle, turn, asked, instead=True)

    def new_turn(self, sampling: Sampling, seed: int | None) -> Turn:
        """How the next answer is to be written; without a seed, one is drawn and recorded."""
        return Turn(sampling, self._rng.randrange(2**31) if seed is None else seed)

    def _start(self, battle: Battle, turn: Turn, asked: list[Messages], *, instead: bool = False) -> None:
        """Have every pane answer what it is asked, in a new turn or instead of the last one.

        Blind, the seed asked for is salted by the battle: else the same question in another tab would give the same
        answers, and its vote the names. The vote holds the seed that was used.
        """
        if self.setup.blind:
            turn.seed = _salted(turn.seed, battle.salt)
        rows = tuple(
            Row(pane.contestant.reference, list(messages), turn.seed)
            for pane, messages in zip(battle.panes, asked, strict=True)
        )
        try:
            handle = self.engine.submit(GenerationRequest(rows, turn.sampling))
        except EngineBusy:
            raise ActionRefused("queue_full") from None
        with battle.lock:
            for pane, messages in zip(battle.panes, asked, strict=True):
                pane.messages, pane.answer, pane.done, pane.error = messages, "", None, None
            battle.turns = [*(battle.turns[:-1] if instead else battle.turns), turn]
            battle.phase, battle.nonce, battle.handle = "streaming", uuid.uuid4().hex, handle

    async def frames(self, battle: Battle) -> AsyncIterator[None]:
        """Follow the answers of a battle, yielding whenever it is time to draw them again."""
        assert battle.handle is not None
        turn = battle.turns[-1]
        drawn = 0.0
        try:
            async for event in battle.handle.events():
                battle.apply(event, turn)
                if time.monotonic() - drawn >= FRAME_SECONDS:
                    yield
                    drawn = time.monotonic()  # from its end on: else a slow page would draw every token, ever later
        finally:
            self._end(battle, turn)

    def _end(self, battle: Battle, turn: Turn) -> None:
        """Close a turn whose answers have ended, whose visitor has left, or who has seen enough."""
        if not battle.end_turn(turn):
            return
        for pane in battle.panes:
            if pane.error is not None:
                sys.stderr.write(f"battle {battle.id}: {pane.error}\n")
        if self.setup.reward is not None and battle.phase == "answered":
            talks = [list(pane.messages) for pane in battle.panes]
            battle.scoring = self._scorer.submit(self._score, turn, talks)

    def _score(self, turn: Turn, talks: list[Messages]) -> None:
        turn.scores = [self.engine.reward(messages) for messages in talks]

    def stop(self, battle: Battle | None) -> None:
        """Stop all answers of a battle; what was written so far stays and can be voted on."""
        if battle is not None and battle.handle is not None:
            battle.handle.cancel()

    def vote(self, battle: Battle | None, choice: str, nonce: str, details: VoteDetails = NO_DETAILS) -> None:
        """Record a choice (a pane's letter, "tie" or "bad") once, and close the battle; `cast` says what it refuses.

        A vote on answers that are still being written stops them where they are.
        """
        if battle is not None and battle.phase == "streaming" and battle.votable and nonce == battle.nonce:
            self._end(battle, battle.turns[-1])
            self.stop(battle)
        if battle is not None and battle.scoring is not None:
            # Whatever went wrong there, the vote is kept.
            for scoring in wait([battle.scoring], SCORE_SECONDS).done:
                if error := scoring.exception():
                    sys.stderr.write(f"the answers have no scores: {error}\n")
        cast(battle, choice, nonce, details, (self.setup, self.votes))


def cast(
    battle: Battle | None, choice: str, nonce: str, details: VoteDetails, keeping: tuple[Setup, VoteStore]
) -> None:
    """Keep a vote on a battle whose answers have ended, once.

    Raises ActionRefused for a vote on answers that are not there, not these, or judged already; MachineError when the
    disk does not take it, after which the same vote may be given again.
    """
    setup, votes = keeping
    if battle is None:
        raise ActionRefused("nothing_to_judge")
    with battle.lock:
        if battle.phase == "voted":
            raise ActionRefused("voted_already")
        if battle.phase != "answered" or nonce != battle.nonce:
            raise ActionRefused("nothing_to_judge")
        votes.append(build_vote_rows(battle, choice, setup, details))
        battle.phase, battle.choice = "voted", choice


def _salted(seed: int, salt: str) -> int:
    """Return a seed that only this battle has; 53 bits, as many as a browser's numbers hold."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{seed}".encode()).digest()[:8]) >> 11


def _before_answer(messages: Messages) -> Messages:
    return messages[:-1] if messages[-1]["role"] == "assistant" else list(messages)
