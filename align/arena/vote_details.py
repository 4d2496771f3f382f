"""The rows that one decision adds to the votes, with their full provenance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.arena.battles import Battle, Setup, Turn

LETTERS = "abcd"
TAGS = ("correct", "helpful", "clear", "concise", "harmless", "format")
"""reasons offered by the page; a voter may give others"""
MAX_REASON_CHARACTERS = 2000
_MAX_WORD_CHARACTERS, _MAX_TAGS = 64, 8


def clean(text: str) -> str:
    """Return stripped text without lone surrogates, which browsers can send and UTF-8 files cannot hold."""
    return text.strip().encode("utf-8", "replace").decode()


def _clean_word(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in clean(text)).split())[
        :_MAX_WORD_CHARACTERS
    ]


@dataclass(frozen=True)
class VoteDetails:
    """A voter's additions to a choice; texts from the browser are cleaned and truncated here."""

    reason: str = ""
    tags: tuple[str, ...] = ()
    voter: str = ""
    """a pseudonym"""

    def __post_init__(self) -> None:
        tags = dict.fromkeys(_clean_word(tag) for tag in self.tags)
        object.__setattr__(self, "reason", clean(self.reason)[:MAX_REASON_CHARACTERS])
        object.__setattr__(self, "tags", tuple(tag for tag in tags if tag)[:_MAX_TAGS])
        object.__setattr__(self, "voter", _clean_word(self.voter))


NO_DETAILS = VoteDetails()


def choices(panes: int) -> list[str]:
    """Return the choices of a vote over this many panes, in the order of the keys 1, 2, 3, ..."""
    return [*LETTERS[:panes], "tie", "bad"]


def build_vote_rows(
    battle: Battle, choice: str, setup: Setup, details: VoteDetails = NO_DETAILS
) -> list[dict[str, Any]]:
    """Return the rows of one vote: with more than two panes the best one beats each of the others.

    A tie, or a vote that all are bad, gives a row for every two panes. A vote on several turns is stored whole but is
    not `comparable`: the later answers have different contexts, so they are no preference pair.
    """
    if choice not in choices(len(battle.panes)):
        raise ValueError(f"choice {choice!r}: expected one of {choices(len(battle.panes))}")
    pairs = list(combinations(range(len(battle.panes)), 2))
    if choice in LETTERS:
        best = LETTERS.index(choice)
        pairs = [pair for pair in pairs if best in pair]
    return [
        _pair_row(battle, pair, choice, setup)
        | {"voter": details.voter, "reason": details.reason, "tags": list(details.tags)}
        for pair in pairs
    ]


def _pair_row(battle: Battle, pair: tuple[int, int], choice: str, setup: Setup) -> dict[str, Any]:
    sides = dict(zip("ab", pair, strict=True))
    panes = {side: battle.panes[index] for side, index in sides.items()}
    if choice in LETTERS:
        choice = "a" if sides["a"] == LETTERS.index(choice) else "b"
    last = battle.turns[-1]
    return {
        "id": f"{battle.id}-{LETTERS[pair[0]]}{LETTERS[pair[1]]}",
        "prompt": panes["a"].messages[: -_own_messages(battle)],
        "a": panes["a"].messages[-_own_messages(battle) :],
        "b": panes["b"].messages[-_own_messages(battle) :],
        "choice": choice,
        "comparable": len(battle.turns) == 1,
        "models": {side: pane.contestant.reference for side, pane in panes.items()},
        "digests": {side: pane.contestant.digest for side, pane in panes.items()},
        "base": setup.base,
        "sampling": asdict(last.sampling),
        "seed": last.seed,
        "turn": len(battle.turns) - 1,
        "turns": [_turn_row(turn, sides) for turn in battle.turns],
        "truncated": any(turn.truncated for turn in battle.turns),
        **_scores(last, sides, setup),
        **({"review": battle.review} if battle.review else {}),
        "battle": battle.id,
        "sides": sides,
        "panes": len(battle.panes),
        "mode": "blind" if setup.blind else "named",
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "app_version": setup.app_version,
    }


def _scores(turn: Turn, sides: dict[str, int], setup: Setup) -> dict[str, Any]:
    """Return the reward model's scores of the last answers, when both have one."""
    scores = {side: turn.scores[index] for side, index in sides.items()} if turn.scores else {}
    complete = bool(scores) and all(score is not None and isfinite(score) for score in scores.values())
    return {"scores": scores, "reward_model": asdict(setup.reward)} if setup.reward and complete else {}


def _own_messages(battle: Battle) -> int:
    """Return how many messages at the end of each pane, from the first answer on, are not shared by all."""
    return 2 * len(battle.turns) - 1


def _turn_row(turn: Turn, sides: dict[str, int]) -> dict[str, Any]:
    outcomes = {side: turn.outcomes[index] for side, index in sides.items()}
    return {
        "sampling": asdict(turn.sampling),
        "seed": turn.seed,
        "regenerated": turn.regenerated,
        **{
            side: {"reason": done.reason, "tokens": done.completion_tokens, "seconds": round(done.seconds, 3)}
            for side, done in outcomes.items()
            if done is not None
        },
    }
