"""The leaderboard: strengths of models, their intervals and warnings, estimated from the rows of votes.

Strengths follow Bradley and Terry (1952): the probability that A is preferred to B, A shown first, is
sigmoid(strength A - strength B + position). Intervals are 95 % and clustered by prompt, since votes on one prompt are
correlated. A tie is half a win for each, or Davidson's (1970) third outcome. A vote that no answer is good is counted
apart and is no part of the fit, nor is a repeated vote, which only measures its voter's consistency.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np

from align.arena.maximum_likelihood import Array, ChoiceFit, fit_choices
from align.statistics import cohen_kappa, student_quantile

ENOUGH_VOTES = 10
"""A model with fewer gets no strength; an even 10 leave its win probability anywhere from 0.24 to 0.76."""
ENOUGH_PROMPTS = 5
"""An interval clustered by fewer prompts than this is far too narrow."""

Ties = Literal["half", "davidson"]


WARNINGS = {
    "order_fixed": "each pair was always shown in one order: position bias cannot be estimated",
    "one_sided": "{models}: every vote between them and the others goes one way; a conservative difference is shown",
    "cautious": "in one display order every vote goes one way; conservative strengths and position bias are shown",
    "none_good": "{votes} votes found no answer good: they are not ties and do not affect the ranking",
    "named": "{named} of {votes} votes were cast with the names shown",
    "two_digests": "{model} is the name of {count} different models (their digests differ); rank them apart by time",
    "disconnected": "no votes connect these groups, so their strengths cannot be compared: {groups}",
    "not_enough": "not enough votes to place {models}: at least {votes} votes each on {prompts} prompts are needed",
}


@dataclass(frozen=True)
class LeaderboardWarning:
    """A warning, in English as text; the page translates it by its key."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return WARNINGS[self.key].format(**self.values)


class PairRecord(NamedTuple):
    """Votes between two models, seen from the first."""

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
        """The same three as probabilities."""
        return _sigmoid(self.value), _sigmoid(self.low), _sigmoid(self.high)


@dataclass(frozen=True)
class Rating:
    """One model's row. Strength is in log-odds around its group's mean; None where there are not enough votes."""

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
        """The probability that it is preferred to an average model of its group."""
        return None if self.strength is None else _sigmoid(self.strength)


@dataclass(frozen=True)
class Agreement:
    """The share of equal decisions of two raters, and Cohen's kappa."""

    share: float
    kappa: float
    votes: int


@dataclass(frozen=True)
class Leaderboard:
    """All ratings, best first, those without enough votes last."""

    standings: list[Rating]
    matrix: dict[str, dict[str, PairRecord]]
    """by row and column, seen from the row's model"""
    position_bias: LogOddsEstimate | None
    """log-odds that the first answer is preferred between equal models; None where the votes do not determine it"""
    agreement: Agreement | None
    """of the reward model, which prefers what it scores higher, with the voters"""
    warnings: list[LeaderboardWarning] = field(default_factory=list)
    votes: int = 0
    prompts: int = 0
    self_agreement: Agreement | None = None
    """of voters with themselves, where a comparison was repeated with its sides swapped"""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        matrix = {one: {other: cell._asdict() for other, cell in row.items()} for one, row in self.matrix.items()}
        standings = [asdict(rating) | {"chance": rating.chance} for rating in self.standings]
        return asdict(self) | {"standings": standings, "matrix": matrix, "warnings": list(map(str, self.warnings))}


@dataclass(frozen=True)
class _Votes:
    """Votes as arrays (N,): indices of the models shown first and second, the first one's score, and the prompt."""

    names: list[str]
    first: np.ndarray
    second: np.ndarray
    won: np.ndarray
    """1 where the first won, 0.5 for a tie, 0 where the second won"""
    prompt: np.ndarray


def leaderboard(rows: Sequence[dict[str, Any]], ties: Ties = "half") -> Leaderboard:
    """Return the leaderboard of rows of votes; a model against itself is left out."""
    comparisons = [row for row in rows if row["models"]["a"] != row["models"]["b"]]
    rows = [row for row in comparisons if not is_repeat(row)]
    names = list(dict.fromkeys(row["models"][side] for row in rows for side in "ab"))
    votes = _to_arrays(names, [row for row in rows if row["choice"] != "bad"])
    groups = _connected_groups(votes)
    matrix = _pair_matrix(votes)
    strengths, bias, fit_warnings = _fit_strengths(votes, groups, ties)
    bad = Counter(row["models"][side] for row in rows if row["choice"] == "bad" for side in "ab")
    standings = []
    for (name, row), strength, group in zip(matrix.items(), strengths, groups, strict=True):
        wins, tied, losses = (sum(cell[index] for cell in row.values()) for index in range(3))
        votes_on_it = wins + tied + losses
        known = strength if votes_on_it >= ENOUGH_VOTES else None
        value, low, high = (known.value, known.low, known.high) if known else (None, None, None)
        standings.append(Rating(name, value, low, high, votes_on_it, wins, tied, losses, group, bad[name]))
    standings.sort(key=lambda rating: (rating.group, rating.strength is None, -(rating.strength or 0), -rating.votes))
    warnings = [*_vote_warnings(rows), *fit_warnings, *_rating_warnings(standings)]
    prompts = len({json.dumps(row.get("prompt"), sort_keys=True) for row in rows})
    reward_model = [
        (row["choice"] == "a", row["scores"]["a"] > row["scores"]["b"])
        for row in rows
        if row["choice"] in ("a", "b") and row.get("scores") and row["scores"]["a"] != row["scores"]["b"]
    ]
    agreements = _agreement(reward_model), _agreement(_repeated_decisions(comparisons))
    return Leaderboard(standings, matrix, bias, agreements[0], warnings, len(rows), prompts, agreements[1])


def is_repeat(row: dict[str, Any]) -> bool:
    """Return whether a vote is on a comparison that its voter had decided before."""
    return bool((row.get("review") or {}).get("again"))


def _to_arrays(names: list[str], rows: Iterable[dict[str, Any]]) -> _Votes:
    indices = {name: index for index, name in enumerate(names)}
    prompts: dict[str, int] = {}
    seen = []
    for row in rows:
        first, second = (indices[row["models"][side]] for side in "ab")
        prompt = json.dumps(row.get("prompt"), sort_keys=True)
        won = {"a": 1.0, "b": 0.0}.get(row["choice"], 0.5)
        seen.append((first, second, won, prompts.setdefault(prompt, len(prompts))))
    table = np.array(seen, dtype=float).reshape(-1, 4)
    whole = table[:, [0, 1, 3]].astype(np.int64)
    return _Votes(names, whole[:, 0], whole[:, 1], table[:, 2], whole[:, 2])


def _pair_matrix(votes: _Votes) -> dict[str, dict[str, PairRecord]]:
    cells: dict[tuple[int, int], Counter[float]] = {}
    for first, second, won in zip(votes.first.tolist(), votes.second.tolist(), votes.won.tolist(), strict=True):
        cells.setdefault((first, second), Counter())[won] += 1
        cells.setdefault((second, first), Counter())[1 - won] += 1
    matrix: dict[str, dict[str, PairRecord]] = {name: {} for name in votes.names}
    for (one, other), counts in cells.items():
        matrix[votes.names[one]][votes.names[other]] = PairRecord(counts[1.0], counts[0.5], counts[0.0])
    return matrix


def _connected_groups(votes: _Votes) -> list[int]:
    """Return for every model the number of the connected group of votes it is in."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(votes.names)
    links = coo_array((np.ones(len(votes.won)), (votes.first, votes.second)), shape=(count, count))
    return connected_components(links, directed=False)[1].tolist() if count else []


def _fit_strengths(
    votes: _Votes, groups: list[int], ties: Ties
) -> tuple[list[LogOddsEstimate | None], LogOddsEstimate | None, list[LeaderboardWarning]]:
    """Return every model's strength and the position bias, where the votes determine them, with warnings."""
    count = len(votes.names)
    if not len(votes.won):
        return [None] * count, None, []
    warnings = []
    design = np.zeros((len(votes.won), count))
    rows = np.arange(len(votes.won))
    design[rows, votes.first] += 1
    design[rows, votes.second] -= 1
    shown_both_ways = _rank(np.column_stack([design, np.ones(len(design))])) > _rank(design)
    if not shown_both_ways:
        warnings.append(LeaderboardWarning("order_fixed"))
    design = np.column_stack([design, np.full(len(design), float(shown_both_ways))])
    unbounded = _unbounded_models(votes)
    fit = _fit(design, votes, ties)
    if unbounded or not fit.converged:
        fit = _fit(*_add_pseudo_votes(design, votes), ties)
        names = ", ".join(votes.names[index] for index in unbounded)
        warnings.append(
            LeaderboardWarning("one_sided", {"models": names}) if unbounded else LeaderboardWarning("cautious")
        )
    prompts = len(np.unique(votes.prompt))
    if prompts < ENOUGH_PROMPTS or not fit.converged:
        return [None] * count, None, warnings
    quantile = student_quantile(0.975, prompts - 1)
    bias = None
    if shown_both_ways and len(votes.won) >= ENOUGH_VOTES:
        bias = _interval(float(fit.parameters[count]), float(fit.covariance[count, count]), quantile)
    return _centre_strengths(fit, count, groups, quantile), bias, warnings


def _rank(design: Array) -> int:
    return int(np.linalg.matrix_rank(design.T @ design))


def _add_pseudo_votes(design: Array, votes: _Votes) -> tuple[Array, _Votes]:
    """Add a tie in either order for every pair that was compared, so that no strength is infinite."""
    pairs = np.unique(np.sort(np.column_stack([votes.first, votes.second]), axis=1), axis=0)
    orders = np.vstack([pairs, pairs[:, ::-1]])
    extra = np.zeros((len(orders), design.shape[1]))
    rows = np.arange(len(orders))
    extra[rows, orders[:, 0]], extra[rows, orders[:, 1]], extra[:, -1] = 1, -1, design[0, -1]
    new = votes.prompt.max() + 1 + np.tile(np.arange(len(pairs)), 2)
    more = _Votes(
        votes.names,
        np.concatenate([votes.first, orders[:, 0]]),
        np.concatenate([votes.second, orders[:, 1]]),
        np.concatenate([votes.won, np.full(len(orders), 0.5)]),
        np.concatenate([votes.prompt, new]),
    )
    return np.vstack([design, extra]), more


def _fit(design: Array, votes: _Votes, ties: Ties) -> ChoiceFit:
    """Fit the Bradley-Terry model, or Davidson's where some votes are ties and some are not."""
    tied = votes.won == 0.5
    sides = [design / 2, -design / 2]
    if ties == "half" or not 0 < tied.mean() < 1:
        shares = np.column_stack([votes.won, 1 - votes.won])
        return fit_choices(np.stack(sides, axis=1), shares, votes.prompt)
    none = np.zeros((len(design), 1))
    thirds = [np.hstack([side, none]) for side in sides] + [np.hstack([np.zeros_like(design), none + 1])]
    shares = np.column_stack([votes.won == 1, votes.won == 0, tied]).astype(float)
    return fit_choices(np.stack(thirds, axis=1), shares, votes.prompt)


def _unbounded_models(votes: _Votes) -> list[int]:
    """Return the models whose likeliest strength is infinite: of two parts without wins both ways, the smaller.

    Ford's (1957) condition: strengths are finite when from every model there is a chain of wins to every other.
    """
    beats = np.eye(len(votes.names), dtype=bool)
    beats[votes.first[votes.won > 0], votes.second[votes.won > 0]] = True
    beats[votes.second[votes.won < 1], votes.first[votes.won < 1]] = True
    for middle in range(len(beats)):
        beats |= np.outer(beats[:, middle], beats[middle])
    mutual, met = beats & beats.T, beats | beats.T
    size = mutual.sum(1)
    unbounded = [index for index in range(len(beats)) if (met[index] & ~mutual[index]).any()]
    return [index for index in unbounded if size[index] < size[met[index]].max()] or unbounded


def _centre_strengths(fit: ChoiceFit, count: int, groups: list[int], quantile: float) -> list[LogOddsEstimate | None]:
    """Return strengths around the mean of their group, with intervals."""
    member = np.equal.outer(groups, groups)
    centring = np.eye(count) - member / member.sum(1)
    strengths = centring @ fit.parameters[:count]
    variances = np.diag(centring @ fit.covariance[:count, :count] @ centring.T)
    return [_interval(float(value), float(var), quantile) for value, var in zip(strengths, variances, strict=True)]


def _interval(value: float, variance: float, quantile: float) -> LogOddsEstimate:
    margin = quantile * math.sqrt(max(variance, 0.0))
    return LogOddsEstimate(value, value - margin, value + margin)


def _repeated_decisions(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return every voter's first and second decision of a comparison: one of two models, a tie, or neither."""
    decided: tuple[dict[tuple[str, ...], str], dict[tuple[str, ...], str]] = ({}, {})
    for row in rows:
        if review := row.get("review"):
            preferred = row["models"].get(row["choice"], row["choice"])
            numbers = {name: str(index) for index, name in enumerate(sorted(row["models"].values()))}
            comparison = (review["key"], review["item"], str(row.get("voter") or ""))
            decided[is_repeat(row)][comparison] = numbers.get(preferred, preferred)
    first, second = decided
    return [(first[comparison], second[comparison]) for comparison in second if comparison in first]


def _agreement(pairs: Sequence[tuple[Any, Any]]) -> Agreement | None:
    equal = sum(one == other for one, other in pairs)
    return Agreement(equal / len(pairs), cohen_kappa(pairs), len(pairs)) if pairs else None


def _vote_warnings(rows: Sequence[dict[str, Any]]) -> list[LeaderboardWarning]:
    """Return warnings about the votes themselves."""
    warnings = []
    if none_good := {row.get("battle") or index for index, row in enumerate(rows) if row["choice"] == "bad"}:
        warnings.append(LeaderboardWarning("none_good", {"votes": len(none_good)}))
    if named := sum(row.get("mode") == "named" for row in rows):
        warnings.append(LeaderboardWarning("named", {"named": named, "votes": len(rows)}))
    digests: dict[str, set[str]] = {}
    for row in rows:
        for side, digest in (row.get("digests") or {}).items():
            if digest is not None:
                digests.setdefault(row["models"][side], set()).add(digest)
    counts = [{"model": model, "count": len(different)} for model, different in digests.items() if len(different) > 1]
    return warnings + [LeaderboardWarning("two_digests", count) for count in counts]


def _rating_warnings(standings: list[Rating]) -> list[LeaderboardWarning]:
    """Return warnings about groups that nothing connects and about models with too few votes."""
    warnings = []
    groups = [[one.reference for one in members] for _, members in groupby(standings, lambda one: one.group)]
    if len(groups) > 1:
        warnings.append(LeaderboardWarning("disconnected", {"groups": " | ".join(map(", ".join, groups))}))
    if few := [one.reference for one in standings if one.strength is None]:
        values = {"models": ", ".join(few), "votes": ENOUGH_VOTES, "prompts": ENOUGH_PROMPTS}
        warnings.append(LeaderboardWarning("not_enough", values))
    return warnings


def _sigmoid(log_odds: float) -> float:
    return 1 / (1 + math.exp(-max(-700.0, log_odds)))
