"""Battles: models answering the same conversation, up to the vote; knows nothing of the page."""

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

from align.arena.votes import NO_DETAILS, VoteDetails, VoteStore, build_vote_rows, clean
from align.engine.protocol import (
    Engine,
    EngineBusy,
    Event,
    GenerationRequest,
    Row,
    RowDelta,
    RowDone,
    RowFailure,
    Sampling,
)
from align.engine.stream import Stream
from align.schema import Message, Messages, assistant, user

FRAME_SECONDS = 0.05
"""between two updates of a page: redrawing for every token would be slower and no smoother"""
SCORE_SECONDS = 2.0
"""for which a vote waits for the reward model's scores before it is stored without them"""

Phase = Literal["open", "streaming", "answered", "failed", "voted"]


class ActionRefused(Exception):
    """A visitor's action that is not possible now; its text is a key of `PAGE_TEXTS`."""


@dataclass(frozen=True)
class Contestant:
    """A compared model, with the digest of its manifest."""

    reference: str
    digest: str | None = None


@dataclass(frozen=True)
class Setup:
    """The models that a page compares."""

    contestants: tuple[Contestant, ...]
    blind: bool
    base: dict[str, Any] = field(default_factory=dict)
    app_version: str = ""
    reward: Contestant | None = None
    """the reward model the engine holds beside the contestants"""

    @property
    def panes(self) -> int:
        """Number of panes: two in blind battles, else one per model."""
        return 2 if self.blind else len(self.contestants)


@dataclass
class Turn:
    """The sampling of one round of answers, and its outcome in each pane."""

    sampling: Sampling
    seed: int
    regenerated: int = 0
    outcomes: list[RowDone | None] = field(default_factory=list)
    truncated: bool = False
    """some answer was stopped before its end"""
    scores: list[float | None] = field(default_factory=list)
    """the reward model's, where there is one and it was in time"""


@dataclass
class Pane:
    """One model's side of the conversation."""

    contestant: Contestant
    messages: Messages = field(default_factory=list)
    answer: str = ""
    done: RowDone | None = None
    error: str | None = None

    def shown(self) -> Messages:
        """Return the conversation with the answer so far, without the system message."""
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        partial = [assistant(self.answer)] if self.answer and not answered else []
        return [message for message in self.messages if message["role"] != "system"] + partial


@dataclass
class Battle:
    """One comparison, from the first question to the vote that closes it."""

    panes: list[Pane]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    phase: Phase = "open"
    turns: list[Turn] = field(default_factory=list)
    nonce: str = ""
    """a vote must repeat it: valid for these answers only, and once"""
    choice: str | None = None
    handle: Stream | None = None
    scoring: Future[None] | None = None
    review: dict[str, Any] | None = None
    """item of a review queue; such a battle takes no further prompt"""
    salt: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    """secret of this battle, never sent to a browser; mixed into the seed of blind answers"""
    lock: threading.RLock = field(default_factory=threading.RLock)
    settled: threading.Event | None = None
    """set when the page has stopped redrawing the answers; None when it never did while they were generated"""

    @property
    def votable(self) -> bool:
        """True when every pane has an answer, finished or not, and there is no vote yet."""
        if self.phase == "streaming":
            return all(pane.error is None and pane.answer.strip() for pane in self.panes)
        return self.phase == "answered"

    def apply(self, event: Event, turn: Turn) -> None:
        """Apply an engine event to one pane of a turn; after the turn has ended only its outcome is recorded."""
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
        """End a turn with the answers as they are; False when it had ended before."""
        with self.lock:
            if turn is not self.turns[-1] or self.phase != "streaming":
                return False
            turn.outcomes = [pane.done for pane in self.panes]
            turn.truncated = any(done is None or done.reason == "cancelled" for done in turn.outcomes)
            for pane in self.panes:
                if pane.done is None and pane.error is None and pane.answer.strip():
                    pane.messages.append(assistant(pane.answer))
            complete = all(pane.messages[-1]["role"] == "assistant" for pane in self.panes)
            self.phase = "answered" if complete else "failed"
            self.nonce = self.nonce if complete else ""
            return True


class Arena:
    """Runs battles on an engine and stores the votes; one per page, shared by its visitors."""

    def __init__(self, engine: Engine, setup: Setup, votes: VoteStore, rng: random.Random | None = None) -> None:
        self.engine, self.setup, self.votes = engine, setup, votes
        self._rng = rng or random.SystemRandom()
        self._scorer = ThreadPoolExecutor(1, "scores")

    def new_battle(self) -> Battle:
        """Return a battle of all models in order, or, when blind, of two sampled at random on random sides."""
        every = self.setup.contestants
        chosen = self._rng.sample(every, 2) if self.setup.blind else every
        return Battle([Pane(contestant) for contestant in chosen])

    def ask(self, battle: Battle, prompt: str, turn: Turn, system: str = "") -> None:
        """Add a user message to every pane and start the answers."""
        refusal = {"streaming": "busy", "failed": "failed", "voted": "voted_already"}.get(battle.phase)
        if battle.review is not None or refusal:
            raise ActionRefused(refusal or "review")
        prompt, system = clean(prompt), clean(system)
        if not prompt:
            raise ActionRefused("empty")
        begin = [Message(role="system", content=system)] if system and not battle.turns else []
        self._start(battle, turn, [[*pane.messages, *begin, user(prompt)] for pane in battle.panes])

    def ask_again(self, battle: Battle, turn: Turn, prompt: str = "") -> None:
        """Replace the last answers by new ones from another seed; with a `prompt`, replace the last question too."""
        if battle.phase not in ("answered", "failed"):
            raise ActionRefused("nothing_to_regenerate")
        if battle.review is not None:
            raise ActionRefused("review")
        turn.regenerated = battle.turns[-1].regenerated + 1
        conversations = [pane.messages for pane in battle.panes]
        prompts = [talk[:-1] if talk[-1]["role"] == "assistant" else list(talk) for talk in conversations]
        if prompt := clean(prompt):
            prompts = [[*messages[:-1], user(prompt)] for messages in prompts]
        else:
            turn.seed += turn.regenerated
        self._start(battle, turn, prompts, replace_last=True)

    def new_turn(self, sampling: Sampling, seed: int | None) -> Turn:
        """Return the next turn; without a seed, one is drawn and recorded."""
        return Turn(sampling, self._rng.randrange(2**31) if seed is None else seed)

    def _start(self, battle: Battle, turn: Turn, prompts: list[Messages], *, replace_last: bool = False) -> None:
        """Generate an answer in every pane, in a new turn or instead of the last one.

        Blind, the seed is salted by the battle: else the same question in another tab would give the same answers, and
        its vote the names. The vote holds the seed that was used.
        """
        if self.setup.blind:
            digest = hashlib.sha256(f"{battle.salt}:{turn.seed}".encode()).digest()
            turn.seed = int.from_bytes(digest[:8]) >> 11  # of 53 bits, as a browser's numbers
        asked = list(zip(battle.panes, prompts, strict=True))
        rows = (Row(pane.contestant.reference, list(messages), turn.seed) for pane, messages in asked)
        try:
            handle = self.engine.submit(GenerationRequest(tuple(rows), turn.sampling))
        except EngineBusy:
            raise ActionRefused("queue_full") from None
        with battle.lock:
            for pane, messages in asked:
                pane.messages, pane.answer, pane.done, pane.error = messages, "", None, None
            battle.turns = [*(battle.turns[:-1] if replace_last else battle.turns), turn]
            battle.phase, battle.nonce, battle.handle = "streaming", uuid.uuid4().hex, handle

    async def frames(self, battle: Battle) -> AsyncIterator[None]:
        """Apply the events of a battle's answers, yielding whenever the page should redraw them."""
        assert battle.handle is not None
        turn = battle.turns[-1]
        drawn = 0.0
        try:
            async for event in battle.handle.events():
                battle.apply(event, turn)
                if time.monotonic() - drawn >= FRAME_SECONDS:
                    yield
                    drawn = time.monotonic()  # from the end of a redraw, so that a slow page falls behind no further
        finally:
            self._end(battle, turn)

    def _end(self, battle: Battle, turn: Turn) -> None:
        """End a turn whose answers are complete, were stopped, or whose visitor has left; then score them."""
        if not battle.end_turn(turn):
            return
        for pane in battle.panes:
            if pane.error is not None:
                sys.stderr.write(f"battle {battle.id}: {pane.error}\n")
        if self.setup.reward is not None and battle.phase == "answered":
            conversations = [list(pane.messages) for pane in battle.panes]

            def score() -> None:
                turn.scores = [self.engine.reward_score(messages) for messages in conversations]

            battle.scoring = self._scorer.submit(score)

    def stop(self, battle: Battle | None) -> None:
        """Stop all answers of a battle; the text so far stays and can be voted on."""
        if battle is not None and battle.handle is not None:
            battle.handle.cancel()

    def vote(self, battle: Battle | None, choice: str, nonce: str, details: VoteDetails = NO_DETAILS) -> None:
        """Record a choice (a pane's letter, "tie" or "bad") once and close the battle; raises as `cast` does.

        A vote on answers that are still being generated stops them.
        """
        if battle is not None and battle.phase == "streaming" and battle.votable and nonce == battle.nonce:
            self._end(battle, battle.turns[-1])
            self.stop(battle)
        if battle is not None and battle.scoring is not None:
            for scoring in wait([battle.scoring], SCORE_SECONDS).done:
                if error := scoring.exception():  # the vote is stored all the same
                    sys.stderr.write(f"the answers have no scores: {error}\n")
        cast(battle, choice, nonce, details, self.setup, self.votes)


def cast(battle: Battle | None, choice: str, nonce: str, details: VoteDetails, setup: Setup, votes: VoteStore) -> None:
    """Store a vote on a battle whose answers have ended, once.

    Raises ActionRefused for a vote on missing or other answers and for a second vote; MachineError when the disk
    refuses it, after which the same vote may be given again.
    """
    if battle is None:
        raise ActionRefused("nothing_to_judge")
    with battle.lock:
        if battle.phase == "voted":
            raise ActionRefused("voted_already")
        if battle.phase != "answered" or nonce != battle.nonce:
            raise ActionRefused("nothing_to_judge")
        votes.append(build_vote_rows(battle, choice, setup, details))
        battle.phase, battle.choice = "voted", choice
