"""Some comparisons of a review come again with their sides swapped, and tell how steady a voter is."""

from __future__ import annotations

import pytest
from test_review_queue import judge_all, make_engine, make_review, open_queue

from align.arena import result_views
from align.arena.__main__ import main
from align.arena.ranking import is_repeat, leaderboard
from align.arena.review_queue import REPEAT_EVERY, ReviewQueue
from align.arena.votes import VoteStore, read_votes
from align.data import load_records
from align.schema import user

PROMPTS = [[user(f"Question {number}")] for number in range(2 * REPEAT_EVERY)]


@pytest.fixture
def queue(tmp_path) -> ReviewQueue:
    queue = open_queue(tmp_path, make_review(prompts=PROMPTS))
    queue.generate(make_engine())
    return queue


def votes(folder) -> list[dict]:
    return read_votes(folder / "votes")


def test_one_of_twelve_comes_again_with_its_sides_swapped_after_others(tmp_path, queue):
    judge_all(queue, "ann")

    rows = votes(tmp_path)
    again = [row for row in rows if is_repeat(row)]
    assert (len(rows), len(again)) == (26, 2)
    assert [rows.index(row) for row in again] == [12, 25]
    for row in again:
        [first] = [other for other in rows if other["prompt"] == row["prompt"] and other is not row]
        assert rows.index(row) - rows.index(first) > REPEAT_EVERY // 2
        assert (first["a"], first["b"]) == (row["b"], row["a"])
        assert first["models"] == {"a": row["models"]["b"], "b": row["models"]["a"]}
        assert first["review"] | {"again": True} == row["review"]


def test_progress_counts_what_comes_again(queue):
    assert queue.progress("ann") == (0, 26)

    judge_all(queue, "ann", most=13)

    assert queue.progress("ann") == (13, 26)
    assert queue.progress("ben") == (0, 26)
    judge_all(queue, "ann")
    assert queue.progress("ann") == (26, 26)


def test_what_comes_again_stays_the_same_in_the_next_run(tmp_path, queue):
    judge_all(queue, "ann", most=12)
    expected = queue.next("ann")

    later = ReviewQueue(queue.review, queue.folder.parent, VoteStore(tmp_path / "votes"))

    found = later.next("ann")
    assert found.review == expected.review
    assert found.review["again"] is True
    assert [pane.contestant for pane in found.panes] == [pane.contestant for pane in expected.panes]


def test_what_comes_again_can_be_skipped_and_comes_last(queue):
    judge_all(queue, "ann", most=12)
    skipped = queue.next("ann")

    queue.skip(skipped)

    assert "again" not in queue.next("ann").review
    assert judge_all(queue, "ann")[-1] == skipped.panes[0].messages[0]["content"]


def test_the_leaderboard_tells_how_steady_voters_are_and_counts_each_comparison_once(tmp_path, queue):
    while (battle := queue.next("ann")) is not None:  # always for the same model
        red = [pane.contestant.reference for pane in battle.panes].index("red@v1")
        queue.vote(battle, "ab"[red], battle.nonce)
    judge_all(queue, "ben")  # always for the left side, so that a swap turns the decision round

    board = leaderboard(votes(tmp_path))

    assert board.votes == 48
    assert (board.self_agreement.share, board.self_agreement.votes) == (0.5, 4)
    assert leaderboard([row for row in votes(tmp_path) if row["voter"] == "ann"]).self_agreement.share == 1
    assert leaderboard([row for row in votes(tmp_path) if not is_repeat(row)]).self_agreement is None


def test_stats_and_the_page_tell_it(tmp_path, queue, capsys):
    judge_all(queue, "ann", "tie")

    assert main(["stats", str(tmp_path / "votes")]) == 0
    told = capsys.readouterr().out
    assert "comes again with its sides swapped: 100% of 2 (kappa 0.00)" in told
    assert told.startswith("24 votes on 24 prompts")
    board = leaderboard(votes(tmp_path))
    assert "100% of 2 repeated comparisons" in result_views.leaderboard_html(board, "en")
    assert "投票者的自我一致性" in result_views.leaderboard_html(board, "zh-CN")


def test_a_decision_is_learned_from_once(tmp_path, queue):
    judge_all(queue, "ann")

    found = load_records("votes", view="preference", roots={"registry": tmp_path})

    assert (found.rows, found.dropped) == (24, {"vote: decided before by this voter": 2})
