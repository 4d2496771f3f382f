"""A review queue: answers to a set of prompts are written first, and voted on blind later, without any model.

Everything is in one folder: `review.json` says what is compared, and `answers/` holds a line for every answer, each
durable before the next. What was decided is in the votes alone, so a queue goes on where it stopped, whoever stopped
it, and generation does the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from align.arena.battles import ActionRefused, Battle, Contestant, Pane, Setup, Turn, cast
from align.arena.vote_details import NO_DETAILS, VoteDetails
from align.arena.votes import VoteStore, read_votes
from align.data.containers import ReadOptions, read_path
from align.engine.protocol import Engine, EngineBusy, GenerationRequest, Handle, Row, RowDone, RowFailure, Sampling
from align.errors import AlignError, DataError, IntegrityError, UsageError
from align.registry.durable import write_durably
from align.schema import Messages, assistant

REVIEW = "review.json"
_ROWS_AT_ONCE = 16
"""Answers asked for together: enough to fill a batch, few enough that little is lost when the program is killed."""
REPEATED = 12
"""Of so many comparisons a voter has decided, one of the first half comes again with its sides swapped: 8 %."""


@dataclass(frozen=True)
class Review:
    """What is compared on which prompts, and how the answers are written."""

    prompts: list[Messages]
    setup: Setup
    sampling: Sampling
    seed: int = 0
    name: str = "review"

    @property
    def key(self) -> str:
        """Its name and a digest of all that shapes the answers: equal reviews have equal keys."""
        held = self.as_dict()
        told = {key: held[key] for key in ("prompts", "contestants", "base", "sampling", "seed")}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return f"{''.join(letter if letter.isalnum() or letter in '-_' else '-' for letter in self.name)}-{digest}"

    def as_dict(self) -> dict[str, Any]:
        """The review as JSON values."""
        setup = asdict(self.setup)
        del setup["blind"]
        held = {"name": self.name, "seed": self.seed, "sampling": asdict(self.sampling), "prompts": self.prompts}
        return {"align_review": 1, **held, **setup}

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Review:
        """The way back of `as_dict`."""
        contestants = tuple(Contestant(**one) for one in held["contestants"])
        reward = Contestant(**held["reward"]) if held["reward"] else None
        sampling = Sampling(**held["sampling"] | {"stop": tuple(held["sampling"]["stop"])})
        setup = Setup(contestants, True, held["base"], held["app_version"], reward)
        return cls(held["prompts"], setup, sampling, held["seed"], held["name"])


class ReviewItem(NamedTuple):
    """One comparison: which prompt, which two contestants, and whether its voter has decided it before."""

    prompt: int
    first: int
    second: int
    again: bool = False

    def __str__(self) -> str:
        return f"{self.prompt}:{self.first}:{self.second}"

    @property
    def name(self) -> str:
        """What it is called among the comparisons of one voter."""
        return _name(str(self), self.again)


def _name(item: str, again: bool) -> str:
    return f"{item}:again" if again else item


def _name_in(told: dict[str, Any]) -> str:
    """The name of the comparison that a vote, or a battle, says it is of."""
    return _name(told["item"], told.get("again", False))


@dataclass(frozen=True)
class WrittenAnswer:
    """What a contestant wrote, and what the reward model thinks of it."""

    done: RowDone
    score: float | None


class ReviewQueue:
    """The comparisons of one review: who has decided which, and what comes next."""

    def __init__(self, folder: Path, review: Review, votes: VoteStore) -> None:
        """Use `open` or `reopen`."""
        self.folder = folder
        self.review = review
        self.setup = replace(review.setup, blind=True)
        self._votes = votes
        self._lock = threading.Lock()
        self._answers = dict(_read_answers(folder / "answers"))
        self._decided: dict[str, dict[str, None]] = {}
        """what each voter has decided, in that order"""
        self._skipped: dict[str, list[str]] = {}
        for row in read_votes(votes.path.parent):
            told = row.get("review") or {}
            if told.get("key") == folder.name:
                self._decided.setdefault(row.get("voter") or "", {})[_name_in(told)] = None

    @classmethod
    def open(cls, review: Review, root: Path, votes: VoteStore) -> ReviewQueue:
        """The queue of a review below `root`, where it may have been begun before.

        Raises DataError without prompts and UsageError with fewer than two contestants.
        """
        prompts = list({json.dumps(prompt, sort_keys=True): prompt for prompt in review.prompts}.values())
        if not prompts:
            raise DataError(f"{review.name}: 0 prompts to review; give a file or dataset with prompts")
        if len(review.setup.contestants) < 2:
            raise UsageError(f"{len(review.setup.contestants)} models given; a review compares at least 2")
        review = replace(review, prompts=prompts)
        return cls(root / review.key, review, votes)

    @classmethod
    def reopen(cls, folder: Path, votes: VoteStore) -> ReviewQueue:
        """The queue in a folder, with nothing but what is there; IntegrityError when that is no review."""
        try:
            review = Review.from_dict(json.loads((folder / REVIEW).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{folder}: no review can be read there ({error}); begin it anew") from None
        return cls(folder, review, votes)

    @property
    def written(self) -> tuple[int, int]:
        """How many answers there are, of how many."""
        return len(self._answers), len(self.review.prompts) * len(self.setup.contestants)

    @property
    def is_written(self) -> bool:
        """Whether every answer is there."""
        return not self._missing()

    def generate(self, engine: Engine, tell: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
        """Write the answers that are missing, and return what went wrong with those that still are.

        Blocks. Every answer is on the disk before it counts, so that a killed program has lost none of them.
        """
        if not (self.folder / REVIEW).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            held = json.dumps(self.review.as_dict(), ensure_ascii=False, indent=1)
            write_durably(self.folder / REVIEW, held.encode())
        store = VoteStore(self.folder / "answers", "answer")
        problems: list[str] = []
        missing = self._missing()
        tell(*self.written)
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            asked = missing[start : start + _ROWS_AT_ONCE]
            rows = tuple(
                Row(self.setup.contestants[who].reference, list(self.review.prompts[prompt]), self.review.seed + prompt)
                for prompt, who in asked
            )
            handle = _submit(engine, GenerationRequest(rows, self.review.sampling))
            try:
                for event in handle:
                    if isinstance(event, RowDone) and event.reason != "cancelled":
                        self._keep(store, asked[event.row], event, engine)
                        tell(*self.written)
                    elif isinstance(event, RowFailure):
                        problems.append(event.message)
            finally:
                handle.cancel()
        return problems

    def next(self, voter: str) -> Battle | None:
        """The next comparison this voter has not decided; None when there is none left.

        Every voter has an order and sides of their own; what comes again goes first, and what was skipped last.
        """
        with self._lock:
            done, skipped = self._decided.get(voter, {}), self._skipped.get(voter, [])
            items = [*self._items(), *self._repeats(voter)]
        open_items = [item for item in items if item.name not in done]
        if not open_items:
            return None

        def place(item: ReviewItem) -> tuple[int, bool, bytes]:
            waits = skipped.index(item.name) if item.name in skipped else -1
            return waits, not item.again, self._draw(voter, item.name)

        return self._battle(min(open_items, key=place), voter)

    def skip(self, battle: Battle) -> None:
        """Put a comparison behind all others of its voter."""
        assert battle.review is not None
        with self._lock:
            skipped = self._skipped.setdefault(battle.review["voter"], [])
            name = _name_in(battle.review)
            skipped[:] = [other for other in skipped if other != name] + [name]

    def vote(self, battle: Battle | None, choice: str, nonce: str, details: VoteDetails = NO_DETAILS) -> None:
        """Record a choice as `Arena.vote` does, under the pseudonym the comparison was handed out to."""
        if battle is None or battle.review is None:
            raise ActionRefused("nothing_to_judge")
        voter, name = battle.review["voter"], _name_in(battle.review)
        with self._lock:
            if name in self._decided.get(voter, {}):
                raise ActionRefused("voted_already")
            cast(battle, choice, nonce, replace(details, voter=voter), (self.setup, self._votes))
            self._decided.setdefault(voter, {})[name] = None

    def progress(self, voter: str) -> tuple[int, int]:
        """How many comparisons this voter has decided, of how many that can be; those that come again count, too."""
        items = {item.name for item in self._items()}
        done = self._decided.get(voter, {})
        again = sum(item.name in done for item in self._repeats(voter))
        return len(items & done.keys()) + again, len(items) + len(items) // REPEATED

    def _items(self) -> Iterator[ReviewItem]:
        """Every comparison whose answers are there."""
        pairs = list(itertools.combinations(range(len(self.setup.contestants)), 2))
        for prompt in range(len(self.review.prompts)):
            for first, second in pairs:
                if self._answer(prompt, first) and self._answer(prompt, second):
                    yield ReviewItem(prompt, first, second)

    def _repeats(self, voter: str) -> Iterator[ReviewItem]:
        """What a voter is to decide again: of each dozen decided, one of the first half, so that others came since."""
        items = {item.name: item for item in self._items()}
        judged = [items[name] for name in self._decided.get(voter, {}) if name in items]
        for end in range(REPEATED, len(judged) + 1, REPEATED):
            early = judged[end - REPEATED : end - REPEATED // 2]
            yield min(early, key=lambda item: self._draw(voter, f"again {item}"))._replace(again=True)

    def _answer(self, prompt: int, who: int) -> WrittenAnswer | None:
        return self._answers.get((prompt, self.setup.contestants[who].reference))

    def _missing(self) -> list[tuple[int, int]]:
        everything = itertools.product(range(len(self.review.prompts)), range(len(self.setup.contestants)))
        return [(prompt, who) for prompt, who in everything if self._answer(prompt, who) is None]

    def _keep(self, store: VoteStore, asked: tuple[int, int], done: RowDone, engine: Engine) -> None:
        prompt, who = asked
        model = self.setup.contestants[who].reference
        score = None
        if self.setup.reward is not None:
            try:
                score = engine.reward([*self.review.prompts[prompt], assistant(done.text)])
            except AlignError as error:
                sys.stderr.write(f"prompt {prompt + 1}: the answer has no score: {error}\n")
        store.append([{"prompt": prompt, "model": model, "score": score, **asdict(done)}])
        with self._lock:
            self._answers[prompt, model] = WrittenAnswer(done, score)

    def _draw(self, voter: str, what: str) -> bytes:
        """A number drawn for a voter and a thing, the same in every run."""
        return hashlib.blake2b(f"{self.folder.name}\0{voter}\0{what}".encode(), digest_size=8).digest()

    def _battle(self, item: ReviewItem, voter: str) -> Battle:
        sides = [item.first, item.second]
        if (self._draw(voter, f"sides of {item}")[0] & 1) != item.again:
            sides.reverse()
        answers = [answer for who in sides if (answer := self._answer(item.prompt, who)) is not None]
        prompt = self.review.prompts[item.prompt]
        panes = [
            Pane(self.setup.contestants[who], [*prompt, assistant(answer.done.text)], answer.done.text, answer.done)
            for who, answer in zip(sides, answers, strict=True)
        ]
        turn = Turn(self.review.sampling, self.review.seed + item.prompt)
        turn.outcomes = [answer.done for answer in answers]
        turn.scores = [answer.score for answer in answers]
        battle = Battle(panes, phase="answered", turns=[turn])
        battle.nonce = uuid.uuid4().hex
        battle.review = {"key": self.folder.name, "item": str(item), "voter": voter}
        battle.review |= {"again": True} if item.again else {}
        return battle


def _submit(engine: Engine, request: GenerationRequest) -> Handle:
    while True:
        try:
            return engine.submit(request)
        except EngineBusy as busy:
            time.sleep(busy.retry_after)


def _read_answers(folder: Path) -> Iterator[tuple[tuple[int, str], WrittenAnswer]]:
    """The answers on the disk; a line torn off by a power cut was never counted."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    for raw in read_path(folder, str(folder), [], ReadOptions(appended=True)):
        if not isinstance(raw.value, dict):
            raise DataError(f"{raw.source}:{raw.line}: is no answer; remove the line to have it written anew")
        held = dict(raw.value)
        prompt, model, score = held.pop("prompt"), held.pop("model"), held.pop("score")
        yield (prompt, model), WrittenAnswer(RowDone(**held), score)
