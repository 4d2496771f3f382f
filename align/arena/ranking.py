"""Who is better, how sure that is, and what the votes cannot say: a leaderboard from the rows of votes.

Strengths follow Bradley and Terry (1952): the chance that A is preferred to B, A shown first, is
sigmoid(strength A - strength B + position). Intervals are 95 % and clustered by prompt, since votes on one prompt hang
together. A tie is half a win for each; or Davidson's (1970) third outcome. A vote that no answer is good orders no
models: it is counted apart, however many answers were shown, and is no part of the fit. A vote on what its voter has
decided before says something of the voter, and nothing more of the models.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from align.arena.maximum_likelihood import Array, ChoiceFit, fit_choices
from align.statistics import cohen_kappa, student_quantile

ENOUGH_VOTES = 10
"""A model with fewer gets no strength; an even 10 leave its chance anywhere from 0.24 to 0.76."""
ENOUGH_PROMPTS = 5
"""An interval clustered by fewer prompts than this is far too narrow."""

Ties = Literal["half", "davidson"]


WARNINGS = {
    "order_fixed": "each pair was always shown in one order: position bias cannot be told",
    "one_sided": "{models}: every vote between them and the others goes one way; a cautious difference is shown",
    "cautious": "in one order every vote goes one way; cautious strengths and position bias are shown",
    "none_good": "{votes} votes found no answer good: these are no ties and place nobody",
    "named": "{named} of {votes} votes were cast with the names shown",
    "two_digests": "{model} names {count} different models (their digests differ); rank them apart by time",
    "disconnected": "nobody voted between these groups, so their strengths cannot be compared: {groups}",
    "not_enough": "not enough votes to place {models}: {votes} votes each on {prompts} prompts are the least",
}
"""What a leaderboard may warn of."""


class LeaderboardWarning(str):
    """A warning in English, with the key and values to say it in another language."""

    key: str
    values: dict[str, Any]

    def __new__(cls, key: str, **values: Any) -> LeaderboardWarning:
        """A text that knows its key."""
        remark = super().__new__(cls, WARNINGS[key].format(**values))
        remark.key, remark.values = key, values
        return remark


class PairRecord(NamedTuple):
    """How often one model was preferred to another, neither was, and the other was."""

    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class LogOddsEstimate:
    """A log-odds with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def chance(self) -> tuple[float, float, float]:
        """The same as probabilities."""
        return _chance(self.value), _chance(self.low), _chance(self.high)


@dataclass(frozen=True)
class Rating:
    """One model's place. Strength is in log-odds around its group's mean; None says that there are not enough votes."""

    reference: str
    strength: float | None
    low: float | None
    high: float | None
    votes: int
    wins: int
    ties: int
    losses: int
    group: int = 0
    """strengths can be compared within a group only"""
    bad: int = 0
    """comparisons of it in which no answer was good; no part of `votes`"""

    @property
    def chance(self) -> float | None:
        """How likely it is preferred to an average model of its group."""
        return None if self.strength is None else _chance(self.strength)


@dataclass(frozen=True)
class Agreement:
    """How often two decide alike, and Cohen's (1960) kappa of the two."""

    share: float
    kappa: float
    votes: int


@dataclass(frozen=True)
class Leaderboard:
    """What the votes say of everybody who took part, best first; those without enough votes come last."""

    standings: list[Rating]
    matrix: dict[str, dict[str, PairRecord]]
    """by row and column, seen from the row's model"""
    position_bias: LogOddsEstimate | None
    """log-odds that the answer shown first is preferred among equals; None where the votes cannot tell"""
    agreement: Agreement | None
    """of the reward model, which prefers what it scores higher, with the voters"""
    warnings: list[LeaderboardWarning] = field(default_factory=list)
    votes: int = 0
    prompts: int = 0
    self_agreement: Agreement | None = None
    """of voters with themselves, where a comparison came again with its sides swapped"""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        matrix = {one: {other: cell._asdict() for other, cell in row.items()} for one, row in self.matrix.items()}
        standings = [asdict(standing) | {"chance": standing.chance} for standing in self.standings]
        return asdict(self) | {"standings": standings, "matrix": matrix, "warnings": list(map(str, self.warnings))}


@dataclass(frozen=True)
class _Votes:
    """The votes as numbers: indices of the models shown first and second, what the first one won, and the prompt."""

    names: list[str]
    first: np.ndarray
    second: np.ndarray
    won: Array
    """1, 0 or a half for neither"""
    prompt: np.ndarray


def leaderboard(rows: Sequence[dict[str, Any]], ties: Ties = "half") -> Leaderboard:
    """Rank the models in rows of votes; rows of a model against itself say nothing and are passed over."""
    every = [row for row in rows if row["models"]["a"] != row["models"]["b"]]
    rows = [row for row in every if not comes_again(row)]
    names = list(dict.fromkeys(row["models"][side] for row in rows for side in "ab"))
    votes = _count(names, [row for row in rows if row["choice"] != "bad"])
    groups = _groups(len(votes.names), zip(votes.first, votes.second, strict=True))
    matrix = _matrix(votes)
    warnings: list[LeaderboardWarning] = _remarks(rows)
    strengths, bias, remarks = _strengths(votes, groups, ties)
    bad = Counter(row["models"][side] for row in rows if row["choice"] == "bad" for side in "ab")
    standings = [
        replace(_standing(name, row, strength, group), bad=bad[name])
        for (name, row), strength, group in zip(matrix.items(), strengths, groups, strict=True)
    ]
    standings.sort(key=lambda one: (one.group, one.strength is None, -(one.strength or 0), -one.votes))
    warnings += [*remarks, *_groups_apart(standings), *_too_few(standings)]
    prompts = len({json.dumps(row.get("prompt"), sort_keys=True) for row in rows})
    return Leaderboard(standings, matrix, bias, _agreement(rows), warnings, len(rows), prompts, _self_agreement(every))


def comes_again(row: dict[str, Any]) -> bool:
    """Whether a vote is on a comparison that its voter had decided before."""
    return bool((row.get("review") or {}).get("again"))


def _count(names: list[str], rows: Iterable[dict[str, Any]]) -> _Votes:
    places = {name: place for place, name in enumerate(names)}
    prompts: dict[str, int] = {}
    seen = []
    for row in rows:
        first, second = (places[row["models"][side]] for side in "ab")
        prompt = json.dumps(row.get("prompt"), sort_keys=True)
        won = {"a": 1.0, "b": 0.0}.get(row["choice"], 0.5)
        seen.append((first, second, won, prompts.setdefault(prompt, len(prompts))))
    table = np.array(seen, dtype=float).reshape(-1, 4)
    whole = table[:, [0, 1, 3]].astype(np.int64)
    return _Votes(names, whole[:, 0], whole[:, 1], table[:, 2], whole[:, 2])


def _matrix(votes: _Votes) -> dict[str, dict[str, PairRecord]]:
    cells: dict[tuple[int, int], Counter[float]] = {}
    for first, second, won in zip(votes.first.tolist(), votes.second.tolist(), votes.won.tolist(), strict=True):
        cells.setdefault((first, second), Counter())[won] += 1
        cells.setdefault((second, first), Counter())[1 - won] += 1
    matrix: dict[str, dict[str, PairRecord]] = {name: {} for name in votes.names}
    for (one, other), found in cells.items():
        matrix[votes.names[one]][votes.names[other]] = PairRecord(found[1.0], found[0.5], found[0.0])
    return matrix


def _groups(count: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """The number of the connected group each of `count` nodes is in."""
    group = list(range(count))
    for one, other in links:
        kept, gone = sorted((group[one], group[other]))
        if kept != gone:
            group = [kept if number == gone else number for number in group]
    order = {number: place for place, number in enumerate(dict.fromkeys(group))}
    return [order[number] for number in group]


def _strengths(
    votes: _Votes, groups: list[int], ties: Ties
) -> tuple[list[LogOddsEstimate | None], LogOddsEstimate | None, list[LeaderboardWarning]]:
    """Every model's strength and the position bias, where the votes can tell them."""
    count = len(votes.names)
    if not len(votes.won):
        return [None] * count, None, []
    remarks = []
    design = np.zeros((len(votes.won), count))
    places = np.arange(len(votes.won))
    design[places, votes.first] += 1
    design[places, votes.second] -= 1
    shown_both_ways = _rank(np.column_stack([design, np.ones(len(design))])) > _rank(design)
    if not shown_both_ways:
        remarks.append(LeaderboardWarning("order_fixed"))
    design = np.column_stack([design, np.full(len(design), float(shown_both_ways))])
    apart = _apart(votes)
    found = _fit(design, votes, ties)
    if apart or not found.settled:
        found = _fit(*_with_doubt(design, votes), ties)
        names = ", ".join(votes.names[index] for index in apart)
        remarks.append(LeaderboardWarning("one_sided", models=names) if apart else LeaderboardWarning("cautious"))
    prompts = len(np.unique(votes.prompt))
    if prompts < ENOUGH_PROMPTS or not found.settled:
        return [None] * count, None, remarks
    wide = student_quantile(0.975, prompts - 1)
    bias = None
    if shown_both_ways and len(votes.won) >= ENOUGH_VOTES:
        bias = _estimate(float(found.parameters[count]), float(found.covariance[count, count]), wide)
    return _centred(found, count, groups, wide), bias, remarks


def _rank(design: Array) -> int:
    return int(np.linalg.matrix_rank(design.T @ design))


def _with_doubt(design: Array, votes: _Votes) -> tuple[Array, _Votes]:
    """The votes and, for every pair that met, a tie more in either order: so nothing can be infinitely better."""
    met = np.unique(np.sort(np.column_stack([votes.first, votes.second]), axis=1), axis=0)
    orders = np.vstack([met, met[:, ::-1]])
    extra = np.zeros((len(orders), design.shape[1]))
    places = np.arange(len(orders))
    extra[places, orders[:, 0]], extra[places, orders[:, 1]], extra[:, -1] = 1, -1, design[0, -1]
    new = votes.prompt.max() + 1 + np.tile(np.arange(len(met)), 2)
    more = _Votes(
        votes.names,
        np.concatenate([votes.first, orders[:, 0]]),
        np.concatenate([votes.second, orders[:, 1]]),
        np.concatenate([votes.won, np.full(len(orders), 0.5)]),
        np.concatenate([votes.prompt, new]),
    )
    return np.vstack([design, extra]), more


def _fit(design: Array, votes: _Votes, ties: Ties) -> ChoiceFit:
    """The Bradley-Terry model, or Davidson's where some votes are ties and some are not."""
    tied = votes.won == 0.5
    sides = [design / 2, -design / 2]
    if ties == "half" or not 0 < tied.mean() < 1:
        shares = np.column_stack([votes.won, 1 - votes.won])
        return fit_choices(np.stack(sides, axis=1), shares, votes.prompt)
    none = np.zeros((len(design), 1))
    thirds = [np.hstack([side, none]) for side in sides] + [np.hstack([np.zeros_like(design), none + 1])]
    shares = np.column_stack([votes.won == 1, votes.won == 0, tied]).astype(float)
    return fit_choices(np.stack(thirds, axis=1), shares, votes.prompt)


def _apart(votes: _Votes) -> list[int]:
    """The models nothing bounds the strength of; none when everybody, step by step, won something of everybody.

    That is Ford's (1957) condition for the most likely strengths to be finite; a tie is both won and lost. Where a
    few models are cut off from many, the few are named.
    """
    beats = np.eye(len(votes.names), dtype=bool)
    beats[votes.first[votes.won > 0], votes.second[votes.won > 0]] = True
    beats[votes.second[votes.won < 1], votes.first[votes.won < 1]] = True
    for middle in range(len(beats)):
        beats |= np.outer(beats[:, middle], beats[middle])
    mutual, met = beats & beats.T, beats | beats.T
    size = mutual.sum(1)
    apart = [index for index in range(len(beats)) if (met[index] & ~mutual[index]).any()]
    return [index for index in apart if size[index] < size[met[index]].max()] or apart


def _centred(found: ChoiceFit, count: int, groups: list[int], wide: float) -> list[LogOddsEstimate | None]:
    """Strengths around the mean of their group, with intervals."""
    member = np.equal.outer(groups, groups)
    centring = np.eye(count) - member / member.sum(1)
    strengths = centring @ found.parameters[:count]
    covariance = centring @ found.covariance[:count, :count] @ centring.T
    return [
        _estimate(float(value), float(spread), wide)
        for value, spread in zip(strengths, np.diag(covariance), strict=True)
    ]


def _estimate(value: float, variance: float, wide: float) -> LogOddsEstimate:
    margin = wide * math.sqrt(max(variance, 0.0))
    return LogOddsEstimate(value, value - margin, value + margin)


def _standing(name: str, row: dict[str, PairRecord], strength: LogOddsEstimate | None, group: int) -> Rating:
    wins, ties, losses = (sum(cell[place] for cell in row.values()) for place in range(3))
    votes = wins + ties + losses
    if strength is None or votes < ENOUGH_VOTES:
        return Rating(name, None, None, None, votes, wins, ties, losses, group)
    return Rating(name, strength.value, strength.low, strength.high, votes, wins, ties, losses, group)


def _agreement(rows: Iterable[dict[str, Any]]) -> Agreement | None:
    """The reward model against the voters, over votes for one answer on two that it scored apart."""
    pairs = [
        (row["choice"] == "a", row["scores"]["a"] > row["scores"]["b"])
        for row in rows
        if row["choice"] in ("a", "b") and row.get("scores") and row["scores"]["a"] != row["scores"]["b"]
    ]
    return _agreed(pairs)


def _self_agreement(rows: Iterable[dict[str, Any]]) -> Agreement | None:
    """Every voter's second decisions against their first ones: one of two models, a tie, or none of both."""
    decided: tuple[dict[tuple[str, ...], str], dict[tuple[str, ...], str]] = ({}, {})
    for row in rows:
        if told := row.get("review"):
            preferred = row["models"].get(row["choice"], row["choice"])
            place = {name: str(index) for index, name in enumerate(sorted(row["models"].values()))}
            one = (told["key"], told["item"], str(row.get("voter") or ""))
            decided[comes_again(row)][one] = place.get(preferred, preferred)
    first, second = decided
    return _agreed([(first[one], second[one]) for one in second if one in first])


def _agreed(pairs: Sequence[tuple[Any, Any]]) -> Agreement | None:
    if not pairs:
        return None
    count = len(pairs)
    share = sum(one == other for one, other in pairs) / count
    return Agreement(share, cohen_kappa(pairs), count)


def _remarks(rows: Sequence[dict[str, Any]]) -> list[LeaderboardWarning]:
    """What to know about the votes themselves."""
    remarks = []
    refused = {row.get("battle") or place for place, row in enumerate(rows) if row["choice"] == "bad"}
    if refused:
        remarks.append(LeaderboardWarning("none_good", votes=len(refused)))
    named = sum(row.get("mode") == "named" for row in rows)
    if named:
        remarks.append(LeaderboardWarning("named", named=named, votes=len(rows)))
    digests: dict[str, set[str]] = {}
    for row in rows:
        for side, digest in (row.get("digests") or {}).items():
            if digest is not None:
                digests.setdefault(row["models"][side], set()).add(digest)
    for reference, found in digests.items():
        if len(found) > 1:
            remarks.append(LeaderboardWarning("two_digests", model=reference, count=len(found)))
    return remarks


def _groups_apart(standings: list[Rating]) -> list[LeaderboardWarning]:
    groups: dict[int, list[str]] = {}
    for one in standings:
        groups.setdefault(one.group, []).append(one.reference)
    if len(groups) < 2:
        return []
    told = " | ".join(", ".join(names) for names in groups.values())
    return [LeaderboardWarning("disconnected", groups=told)]


def _too_few(standings: list[Rating]) -> list[LeaderboardWarning]:
    few = [one.reference for one in standings if one.strength is None]
    if not few:
        return []
    return [LeaderboardWarning("not_enough", models=", ".join(few), votes=ENOUGH_VOTES, prompts=ENOUGH_PROMPTS)]


def _chance(log_odds: float) -> float:
    return 1 / (1 + math.exp(-max(-700.0, log_odds)))
