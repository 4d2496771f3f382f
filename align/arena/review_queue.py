"""A review queue: answers to a set of prompts are generated first and voted on blind later, without loading a model.

Its folder holds `review.json`, the comparison, and `answers/`, one durable JSON line per answer. Decisions are in the
votes alone, so both generation and voting continue where they stopped.
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

from align.arena.battles import ActionRefused, Battle, Pane, Setup, Turn, cast
from align.arena.votes import NO_DETAILS, VoteDetails, VoteStore, read_votes
from align.data.containers.data_files import DataFile
from align.data.sources import read_path
from align.engine.protocol import Engine, EngineBusy, GenerationRequest, Row, RowDone, RowFailure, Sampling
from align.engine.stream import Stream
from align.errors import AlignError, DataError, UsageError
from align.registry.durable import write_durably
from align.schema import Messages, assistant

REVIEW = "review.json"
_ROWS_PER_REQUEST = 16
"""enough to fill a batch, few enough that little is lost when the program is killed"""
REPEAT_EVERY = 12
"""of every so many decided comparisons, one of the first half is repeated with its sides swapped"""


@dataclass(frozen=True)
class Review:
    """The prompts and models of a comparison, and the sampling of the answers."""

    prompts: list[Messages]
    setup: Setup
    sampling: Sampling
    seed: int = 0
    name: str = "review"

    @property
    def key(self) -> str:
        """The name with a digest of everything that determines the answers."""
        values = self.as_dict()
        identity = {key: values[key] for key in ("prompts", "contestants", "base", "sampling", "seed")}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return f"{''.join(letter if letter.isalnum() or letter in '-_' else '-' for letter in self.name)}-{digest}"

    def as_dict(self) -> dict[str, Any]:
        """Return the review as JSON values."""
        setup = asdict(self.setup)
        del setup["blind"]
        values = {"name": self.name, "seed": self.seed, "sampling": asdict(self.sampling), "prompts": self.prompts}
        return {"align_review": 1, **values, **setup}


class ReviewItem(NamedTuple):
    """One comparison: indices of the prompt and the two models, and whether its voter has decided it before."""

    prompt: int
    first: int
    second: int
    repeated: bool = False

    def __str__(self) -> str:
        return f"{self.prompt}:{self.first}:{self.second}"

    @property
    def name(self) -> str:
        """Its name among the comparisons of one voter."""
        return _name_of({"item": str(self), "again": self.repeated})


def _name_of(review: dict[str, Any]) -> str:
    """Return the name of the comparison in the `review` field of a vote or battle."""
    return f"{review['item']}:again" if review.get("again") else review["item"]


class WrittenAnswer(NamedTuple):
    """A model's answer and its score by the reward model."""

    done: RowDone
    score: float | None


class ReviewQueue:
    """The comparisons of one review: decided ones by voter, and the next one."""

    def __init__(self, review: Review, root: Path, votes: VoteStore) -> None:
        """Open the new or continued queue of a review below `root`.

        Raises DataError without prompts and UsageError with fewer than two models.
        """
        prompts = list({json.dumps(prompt, sort_keys=True): prompt for prompt in review.prompts}.values())
        if not prompts:
            raise DataError(f"{review.name}: 0 prompts to review; give a file or dataset with prompts")
        self._models = [contestant.reference for contestant in review.setup.contestants]
        if len(self._models) < 2:
            raise UsageError(f"models given: {len(self._models)}; a review compares at least 2")
        self.review = replace(review, prompts=prompts)
        self.folder = root / self.review.key
        self.setup = replace(review.setup, blind=True)
        self._votes = votes
        self._lock = threading.Lock()
        self._answers = dict(_read_answers(self.folder / "answers"))
        """by index of the prompt and model"""
        self._decided: dict[str, dict[str, None]] = {}
        """names by voter, in order of decision"""
        self._skipped: dict[str, list[str]] = {}
        for row in read_votes(votes.path.parent):
            voted = row.get("review") or {}
            if voted.get("key") == self.folder.name:
                self._decided.setdefault(row.get("voter") or "", {})[_name_of(voted)] = None

    @property
    def written(self) -> tuple[int, int]:
        """Numbers of answers that are written and of all answers."""
        return len(self._answers), len(self.review.prompts) * len(self._models)

    def generate(
        self, engine: Engine, report_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[str]:
        """Generate the missing answers (blocking), each durable before it counts; returns the errors of failed rows."""
        if not (self.folder / REVIEW).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            values = json.dumps(self.review.as_dict(), ensure_ascii=False, indent=1)
            write_durably(self.folder / REVIEW, values.encode())
        store = VoteStore(self.folder / "answers", "answer")
        problems: list[str] = []
        every = itertools.product(range(len(self.review.prompts)), self._models)
        missing = [index for index in every if index not in self._answers]
        report_progress(*self.written)
        for start in range(0, len(missing), _ROWS_PER_REQUEST):
            indices = missing[start : start + _ROWS_PER_REQUEST]
            rows = (Row(model, list(self.review.prompts[at]), self.review.seed + at) for at, model in indices)
            handle = _submit(engine, GenerationRequest(tuple(rows), self.review.sampling))
            try:
                for event in handle:
                    if isinstance(event, RowDone) and event.reason != "cancelled":
                        self._store_answer(store, indices[event.row], event, engine)
                        report_progress(*self.written)
                    elif isinstance(event, RowFailure):
                        problems.append(event.message)
            finally:
                handle.cancel()
        return problems

    def _store_answer(self, store: VoteStore, index: tuple[int, str], done: RowDone, engine: Engine) -> None:
        (prompt, model), score = index, None
        if self.setup.reward is not None:
            try:
                score = engine.reward_score([*self.review.prompts[prompt], assistant(done.text)])
            except AlignError as error:
                sys.stderr.write(f"prompt {prompt + 1}: the answer has no score: {error}\n")
        store.append([{"prompt": prompt, "model": model, "score": score, **asdict(done)}])
        with self._lock:
            self._answers[index] = WrittenAnswer(done, score)

    def next(self, voter: str) -> Battle | None:
        """Return the next comparison for this voter, or None.

        Every voter has an order and sides of their own; repeated comparisons come first, skipped ones last.
        """
        with self._lock:
            done, skipped = self._decided.get(voter, {}), self._skipped.get(voter, [])
            items = [item for item in (*self._items(), *self._repeats(voter)) if item.name not in done]
        if not items:
            return None

        def order(item: ReviewItem) -> tuple[int, bool, bytes]:
            skip_rank = skipped.index(item.name) if item.name in skipped else -1
            return skip_rank, not item.repeated, self._random_bytes(voter, item.name)

        return self._make_battle(min(items, key=order), voter)

    def skip(self, battle: Battle) -> None:
        """Move a comparison behind all others of its voter."""
        assert battle.review is not None
        with self._lock:
            skipped = self._skipped.setdefault(battle.review["voter"], [])
            name = _name_of(battle.review)
            skipped[:] = [other for other in skipped if other != name] + [name]

    def vote(self, battle: Battle | None, choice: str, nonce: str, details: VoteDetails = NO_DETAILS) -> None:
        """Record a choice as `Arena.vote` does, under the pseudonym of the voter who got the comparison."""
        if battle is None or battle.review is None:
            raise ActionRefused("nothing_to_judge")
        voter, name = battle.review["voter"], _name_of(battle.review)
        with self._lock:
            if name in self._decided.get(voter, {}):
                raise ActionRefused("voted_already")
            cast(battle, choice, nonce, replace(details, voter=voter), self.setup, self._votes)
            self._decided.setdefault(voter, {})[name] = None

    def progress(self, voter: str) -> tuple[int, int]:
        """Return the numbers of comparisons this voter has decided and can decide, repeated ones included."""
        items = {item.name for item in self._items()}
        done = self._decided.get(voter, {})
        repeated = sum(item.name in done for item in self._repeats(voter))
        return len(items & done.keys()) + repeated, len(items) + len(items) // REPEAT_EVERY

    def _items(self) -> Iterator[ReviewItem]:
        """Yield every comparison whose answers are written."""
        pairs = list(itertools.combinations(range(len(self._models)), 2))
        for prompt, pair in itertools.product(range(len(self.review.prompts)), pairs):
            if all((prompt, self._models[index]) in self._answers for index in pair):
                yield ReviewItem(prompt, *pair)

    def _repeats(self, voter: str) -> Iterator[ReviewItem]:
        """Yield the comparisons this voter decides again: of each dozen, one of the first half."""
        items = {item.name: item for item in self._items()}
        judged = [items[name] for name in self._decided.get(voter, {}) if name in items]
        for end in range(REPEAT_EVERY, len(judged) + 1, REPEAT_EVERY):
            early = judged[end - REPEAT_EVERY : end - REPEAT_EVERY // 2]
            yield min(early, key=lambda item: self._random_bytes(voter, f"again {item}"))._replace(repeated=True)

    def _random_bytes(self, voter: str, what: str) -> bytes:
        """Return reproducible random bytes for a voter and a label."""
        return hashlib.blake2b(f"{self.folder.name}\0{voter}\0{what}".encode(), digest_size=8).digest()

    def _make_battle(self, item: ReviewItem, voter: str) -> Battle:
        sides = [item.first, item.second]
        if (self._random_bytes(voter, f"sides of {item}")[0] & 1) != item.repeated:
            sides.reverse()
        answers = [self._answers[item.prompt, self._models[index]] for index in sides]
        prompt = self.review.prompts[item.prompt]
        panes = [
            Pane(self.setup.contestants[index], [*prompt, assistant(done.text)], done.text, done)
            for index, (done, _) in zip(sides, answers, strict=True)
        ]
        turn = Turn(self.review.sampling, self.review.seed + item.prompt)
        turn.outcomes, turn.scores = [done for done, _ in answers], [score for _, score in answers]
        review = {"key": self.folder.name, "item": str(item), "voter": voter}
        again = {"again": True} if item.repeated else {}
        return Battle(panes, phase="answered", turns=[turn], nonce=uuid.uuid4().hex, review=review | again)


def _submit(engine: Engine, request: GenerationRequest) -> Stream:
    while True:
        try:
            return engine.submit(request)
        except EngineBusy as busy:
            time.sleep(busy.retry_after)


def _read_answers(folder: Path) -> Iterator[tuple[tuple[int, str], WrittenAnswer]]:
    """Yield the stored answers; a truncated last line is left out."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    for raw in read_path(DataFile(folder, str(folder), appended=True)):
        if not isinstance(raw.value, dict):
            raise DataError(f"{raw.source}:{raw.line}: is no answer; remove the line to generate it again")
        values = dict(raw.value)
        prompt, model, score = values.pop("prompt"), values.pop("model"), values.pop("score")
        yield (prompt, model), WrittenAnswer(RowDone(**values), score)
