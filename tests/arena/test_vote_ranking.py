from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from align.arena.maximum_likelihood import fit_choices
from align.arena.page_text import PAGE_TEXTS
from align.arena.ranking import WARNINGS, leaderboard
from align.statistics import student_quantile


def vote(first: str, second: str, choice: str, prompt: object = 0, **more) -> dict:
    return {"models": {"a": first, "b": second}, "prompt": [str(prompt)], "choice": choice, **more}


def decided(first: str, second: str, counts: tuple[int, int, int], start: int = 0) -> list[dict]:
    """So many votes for the first, for neither and for the second, each on a prompt of its own."""
    choices = ["a"] * counts[0] + ["tie"] * counts[1] + ["b"] * counts[2]
    return [vote(first, second, choice, start + place) for place, choice in enumerate(choices)]


def sigmoid(value):
    return 1 / (1 + np.exp(-np.asarray(value)))


def drawn(strengths, prompts: int, rng, *, bias: float = 0.0, together: float = 0.0, voters: int = 3) -> list[dict]:
    """Votes under Bradley and Terry's model; on one prompt each voter follows the first with chance `together`."""
    first, step = rng.integers(len(strengths), size=prompts), rng.integers(1, len(strengths), size=prompts)
    second = (first + step) % len(strengths)
    wins = sigmoid(strengths[first] - strengths[second] + bias) > rng.random((voters, prompts))
    follows = rng.random((voters, prompts)) < together
    wins = np.where(follows, wins[0], wins)
    return [
        vote(f"m{one}", f"m{other}", "a" if won else "b", prompt)
        for voted in wins
        for prompt, (one, other, won) in enumerate(zip(first, second, voted, strict=True))
    ]


def strengths_of(board) -> dict[str, float]:
    return {one.reference: one.strength for one in board.standings}


def test_two_models_are_apart_by_the_log_odds_of_their_votes():
    board = leaderboard(decided("a", "b", (30, 0, 10)))

    # ln(30 / 10), half of it on either side of the mean; the spread of a log-odds is sqrt(1/30 + 1/10), times 40/39
    # under the root for the clusters.
    first, second = board.standings
    assert (first.reference, second.reference) == ("a", "b")
    assert first.strength == pytest.approx(math.log(3) / 2)
    assert second.strength == pytest.approx(-math.log(3) / 2)
    spread = math.sqrt((1 / 30 + 1 / 10) * 40 / 39) / 2
    assert first.high - first.strength == pytest.approx(student_quantile(0.975, 39) * spread)
    assert first.chance == pytest.approx(sigmoid(math.log(3) / 2))
    assert (first.votes, first.wins, first.ties, first.losses) == (40, 30, 0, 10)


def test_a_tie_is_half_a_win_for_each():
    board = leaderboard(decided("a", "b", (20, 20, 0)))

    assert board.standings[0].strength == pytest.approx(math.log(30 / 10) / 2)


def test_davidsons_ties_are_an_outcome_of_their_own():
    board = leaderboard(decided("a", "b", (20, 20, 5)), ties="davidson")

    # Given that there is a winner, the odds are Bradley and Terry's: 20 to 5.
    assert board.standings[0].strength == pytest.approx(math.log(20 / 5) / 2)


def test_three_models_settle_where_expected_wins_are_those_observed():
    rows = [
        *decided("a", "b", (30, 4, 11)),
        *decided("b", "a", (9, 2, 14), 100),
        *decided("b", "c", (19, 0, 14), 200),
        *decided("c", "a", (5, 1, 20), 300),
        *decided("a", "c", (13, 3, 7), 400),
    ]

    board = leaderboard(rows)

    # The likelihood's equations (Bradley and Terry 1952): every model's expected wins, and those of the first place,
    # are the ones observed.
    strength, bias = strengths_of(board), board.position_bias.value
    expected, observed = dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 0.0)
    surplus = 0.0
    for row in rows:
        one, other = row["models"]["a"], row["models"]["b"]
        won = {"a": 1.0, "tie": 0.5, "b": 0.0}[row["choice"]]
        chance = sigmoid(strength[one] - strength[other] + bias)
        surplus += won - chance
        for name, value, truth in ((one, chance, won), (other, 1 - chance, 1 - won)):
            expected[name] += value
            observed[name] += truth
    assert expected == pytest.approx(observed, abs=1e-6)
    assert surplus == pytest.approx(0, abs=1e-6)
    assert sum(strength.values()) == pytest.approx(0, abs=1e-9)


def test_the_matrix_is_seen_from_both_sides():
    board = leaderboard([*decided("a", "b", (3, 2, 1)), *decided("b", "a", (5, 0, 0), 50)])

    assert board.matrix["a"]["b"] == (3, 2, 6)
    assert board.matrix["b"]["a"] == (6, 2, 3)


def test_planted_strengths_and_position_bias_are_recovered():
    truth, rng = np.array([1.0, 0.2, -0.3, -0.9]), np.random.default_rng(1)

    board = leaderboard(drawn(truth, 4000, rng, bias=0.5))

    assert [one.reference for one in board.standings] == ["m0", "m1", "m2", "m3"]
    assert [one.strength for one in board.standings] == pytest.approx(truth, abs=0.08)
    assert board.position_bias.value == pytest.approx(0.5, abs=0.08)
    assert board.position_bias.low > 0.3
    assert board.position_bias.chance[0] == pytest.approx(sigmoid(0.5), abs=0.02)
    assert board.warnings == []


def test_intervals_hold_the_truth_nineteen_times_of_twenty_though_votes_on_a_prompt_hang_together():
    truth, rng = np.array([0.7, 0.0, -0.7]), np.random.default_rng(2)
    held, bias, apart = [], [], []
    for repeat in range(400):
        rows = drawn(truth, 70, rng, together=0.6)
        board = leaderboard(rows)
        places = {one.reference: one for one in board.standings}
        held += [places[f"m{index}"].low <= value <= places[f"m{index}"].high for index, value in enumerate(truth)]
        bias.append(board.position_bias.low <= 0 <= board.position_bias.high)
        if repeat < 100:
            alone = leaderboard([row | {"prompt": place} for place, row in enumerate(rows)])
            apart += [one.low <= truth[int(one.reference[1])] <= one.high for one in alone.standings]

    assert 0.93 < np.mean(held) < 0.97
    assert 0.93 < np.mean(bias) < 0.97
    # The same votes taken for votes on prompts of their own claim more than they know.
    assert np.mean(apart) < 0.9


def test_no_position_bias_is_found_where_there_is_none():
    board = leaderboard(drawn(np.array([0.5, 0.0, -0.5]), 400, np.random.default_rng(3)))

    assert board.position_bias.low < 0 < board.position_bias.high


def test_a_pair_always_shown_in_one_order_tells_no_position_bias():
    board = leaderboard(decided("a", "b", (12, 0, 8)))

    assert board.position_bias is None
    assert [remark.key for remark in board.warnings] == ["order_fixed"]


def test_groups_that_never_met_are_told_apart_and_centred_apart():
    board = leaderboard([*decided("a", "b", (20, 0, 10)), *decided("c", "d", (25, 0, 5), 100)])

    [remark] = [remark for remark in board.warnings if remark.key == "disconnected"]
    assert remark.values == {"groups": "a, b | c, d"}
    assert {one.reference: one.group for one in board.standings} == {"a": 0, "b": 0, "c": 1, "d": 1}
    strength = strengths_of(board)
    assert strength["a"] + strength["b"] == pytest.approx(0)
    assert strength["c"] == pytest.approx(math.log(5) / 2)


@pytest.mark.parametrize("choice", ["a", "b", "tie", "bad"])
def test_one_vote_places_nobody(choice):
    board = leaderboard([vote("a", "b", choice)])

    assert [(one.strength, one.low, one.high, one.votes) for one in board.standings] == [
        (None, None, None, int(choice != "bad"))
    ] * 2
    assert "not enough votes to place" in " ".join(map(str, board.warnings))
    assert board.position_bias is None


def test_no_votes_make_an_empty_board():
    board = leaderboard([])

    assert (board.standings, board.matrix, board.votes) == ([], {}, 0)


def test_a_model_with_few_votes_is_listed_without_a_strength():
    board = leaderboard([*decided("a", "b", (20, 0, 10)), *decided("a", "c", (2, 0, 1), 100)])

    assert [(one.reference, one.strength is None) for one in board.standings] == [
        ("a", False),
        ("b", False),
        ("c", True),
    ]


def test_a_thousand_votes_on_two_prompts_place_nobody():
    rows = [vote("a", "b", "ab"[index % 3 == 0], index % 2) for index in range(1000)]

    assert strengths_of(leaderboard(rows)) == {"a": None, "b": None}


def test_a_model_that_never_lost_has_a_finite_strength_and_a_warning():
    board = leaderboard(
        [*decided("a", "b", (15, 0, 0)), *decided("a", "c", (15, 0, 0), 50), *decided("b", "c", (9, 0, 7), 80)]
    )

    [remark] = [remark for remark in board.warnings if remark.key == "one_sided"]
    assert remark.values == {"models": "a"}
    best = board.standings[0]
    assert best.reference == "a"
    assert best.strength < 5
    assert best.high - best.low > 1.5


def test_voters_who_always_take_the_first_answer_give_a_finite_bias():
    rows = [vote("ab"[index % 2], "ba"[index % 2], "a", index) for index in range(30)]

    board = leaderboard(rows)

    assert board.position_bias.low > 1
    assert board.position_bias.high < 10
    assert any(remark.key == "cautious" for remark in board.warnings)


def test_few_votes_that_position_alone_could_explain_claim_little():
    # Shown first, a won 10 of 10; shown second, 9 of 10: both a's strength and the bias could be infinite.
    rows = [*decided("a", "b", (10, 0, 0)), *decided("b", "a", (1, 0, 9), 50)]

    board = leaderboard(rows)

    best = board.standings[0]
    assert [remark.key for remark in board.warnings] == ["cautious"]
    assert 0.8 < best.strength < 2
    assert best.high - best.low > 1.5
    assert board.position_bias.low < 0 < board.position_bias.high


@pytest.mark.parametrize("votes", [15, 25])
def test_few_votes_make_cautious_intervals(votes):
    truth, rng, held = np.array([0.8, -0.8]), np.random.default_rng(4), []
    for _ in range(150):
        board = leaderboard(drawn(truth, votes, rng, voters=1))
        held += [one.low <= truth[int(one.reference[1])] <= one.high for one in board.standings]

    assert np.mean(held) > 0.93


@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_every_warning_has_its_sentence_on_the_page(language):
    places = {key: set(re.findall(r"{(\w+)}", text)) for key, text in WARNINGS.items()}

    assert {key: set(re.findall(r"{(\w+)}", PAGE_TEXTS[language][f"warning_{key}"])) for key in WARNINGS} == places


@pytest.mark.parametrize("ties", ["half", "davidson"])
def test_nothing_but_ties_is_a_draw(ties):
    board = leaderboard(decided("a", "b", (0, 20, 0)), ties)

    assert list(strengths_of(board).values()) == pytest.approx([0, 0])


def test_agreement_with_the_reward_model_is_shared_decisions_and_kappa():
    def scored(choice: str, a: float, b: float) -> dict:
        return vote("a", "b", choice, scores={"a": a, "b": b})

    rows = [scored("a", 2, 1)] * 20 + [scored("b", 2, 1)] * 5 + [scored("a", 1, 2)] * 10 + [scored("b", 1, 2)] * 15
    undecided = [scored("tie", 2, 1), scored("a", 1, 1), vote("a", "b", "a")]

    agreement = leaderboard([*rows, *undecided]).agreement

    # The textbook table: 35 of 50 alike, by chance 0.6 x 0.5 + 0.4 x 0.5 = 0.5.
    assert (agreement.share, agreement.votes) == (0.7, 50)
    assert agreement.kappa == pytest.approx(0.4)
    assert leaderboard(undecided).agreement is None


def test_named_votes_and_one_name_for_two_models_are_told():
    rows = decided("a", "b", (12, 0, 8))
    rows[0] |= {"mode": "named", "digests": {"a": "sha256:1", "b": "sha256:9"}}
    rows[1] |= {"mode": "blind", "digests": {"a": "sha256:2", "b": "sha256:9"}}

    remarks = {remark.key: remark.values for remark in leaderboard(rows).warnings}

    assert remarks["named"] == {"named": 1, "votes": 20}
    assert remarks["two_digests"] == {"model": "a", "count": 2}


def test_a_model_against_itself_says_nothing():
    assert leaderboard([vote("a", "a", "a")]).votes == 0


def test_a_board_is_json():
    board = leaderboard([*decided("a", "b", (12, 1, 8)), *decided("b", "a", (12, 1, 8), 50)])

    told = json.loads(json.dumps(board.as_dict()))

    assert told["matrix"]["a"]["b"] == {"wins": 20, "ties": 2, "losses": 20}
    assert told["standings"][0]["chance"] == pytest.approx(0.5)


def test_a_logistic_regression_settles_at_the_share():
    features = np.stack([np.ones((10, 1)), np.zeros((10, 1))], axis=1)
    shares = np.column_stack([[1] * 8 + [0] * 2, [0] * 8 + [1] * 2]).astype(float)

    found = fit_choices(features, shares, np.arange(10))

    assert found.converged
    assert found.parameters[0] == pytest.approx(math.log(4))
