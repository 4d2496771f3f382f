"""What a vote says: the rows one decision adds to the votes, with everything needed to trust them later."""

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
"""What a page offers as the ground of a choice; a voter may give others."""
_LONGEST_REASON, _LONGEST_WORD, _MOST_TAGS = 2000, 64, 8


def clean(text: str) -> str:
    """Text without lone surrogates, which browsers can send and no file can hold."""
    return text.strip().encode("utf-8", "replace").decode()


def _word(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in clean(text)).split())[:_LONGEST_WORD]


@dataclass(frozen=True)
class VoteDetails:
    """What a voter may add to a choice; texts come from a browser, so they are cleaned and cut here."""

    reason: str = ""
    tags: tuple[str, ...] = ()
    voter: str = ""
    """a pseudonym"""

    def __post_init__(self) -> None:
        tags = dict.fromkeys(_word(tag) for tag in self.tags)
        object.__setattr__(self, "reason", clean(self.reason)[:_LONGEST_REASON])
        object.__setattr__(self, "tags", tuple(tag for tag in tags if tag)[:_MOST_TAGS])
        object.__setattr__(self, "voter", _word(self.voter))


NO_DETAILS = VoteDetails()


def choices(panes: int) -> list[str]:
    """What can be voted with this many panes, in the order of the keys 1, 2, 3, ..."""
    return [*LETTERS[:panes], "tie", "bad"]


def build_vote_rows(
    battle: Battle, choice: str, setup: Setup, details: VoteDetails = NO_DETAILS
) -> list[dict[str, Any]]:
    """The rows of one vote: one for two panes; with more, the best pane beats each of the others.

    A tie or a refusal of all is between every two panes. A vote on several turns is kept whole but is not
    `comparable`: the later answers have different contexts, so they are no pair to learn from.
    """
    if choice not in choices(len(battle.panes)):
        raise ValueError(f"choice {choice!r}: expected one of {choices(len(battle.panes))}")
    pairs = list(combinations(range(len(battle.panes)), 2))
    if choice in LETTERS:
        best = LETTERS.index(choice)
        pairs = [pair for pair in pairs if best in pair]
    return [_row(battle, pair, choice, setup) | _said(details) for pair in pairs]


def _row(battle: Battle, pair: tuple[int, int], choice: str, setup: Setup) -> dict[str, Any]:
    sides = dict(zip("ab", pair, strict=True))
    panes = {side: battle.panes[place] for side, place in sides.items()}
    if choice in LETTERS:
        choice = "a" if sides["a"] == LETTERS.index(choice) else "b"
    last = battle.turns[-1]
    return {
        "id": f"{battle.id}-{LETTERS[pair[0]]}{LETTERS[pair[1]]}",
        "prompt": panes["a"].messages[: -_judged(battle)],
        "a": panes["a"].messages[-_judged(battle) :],
        "b": panes["b"].messages[-_judged(battle) :],
        "choice": choice,
        "comparable": len(battle.turns) == 1,
        "models": {side: pane.contestant.reference for side, pane in panes.items()},
        "digests": {side: pane.contestant.digest for side, pane in panes.items()},
        "base": setup.base,
        "sampling": asdict(last.sampling),
        "seed": last.seed,
        "turn": len(battle.turns) - 1,
        "turns": [_turn(turn, sides) for turn in battle.turns],
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


def _said(details: VoteDetails) -> dict[str, Any]:
    return {"voter": details.voter, "reason": details.reason, "tags": list(details.tags)}


def _scores(turn: Turn, sides: dict[str, int], setup: Setup) -> dict[str, Any]:
    """The reward model's scores of the last answers, when both have one."""
    scores = {side: turn.scores[place] for side, place in sides.items()} if turn.scores else {}
    if (
        setup.reward is None
        or not scores
        or not all(score is not None and isfinite(score) for score in scores.values())
    ):
        return {}
    return {"scores": scores, "reward_model": asdict(setup.reward)}


def _judged(battle: Battle) -> int:
    """How many messages at the end of each pane are not shared by all: from the first answer on, each has its own."""
    return 2 * len(battle.turns) - 1


def _turn(turn: Turn, sides: dict[str, int]) -> dict[str, Any]:
    outcomes = {side: turn.outcomes[place] for side, place in sides.items()}
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
