from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from fake_engine import FakeEngine

from align.arena.battles import ActionRefused, Contestant, Setup
from align.arena.ranking import is_repeat
from align.arena.review_queue import Review, ReviewQueue
from align.arena.votes import VoteDetails, VoteStore, read_votes
from align.data import load_records
from align.engine.protocol import Row, Sampling
from align.errors import DataError, MachineError, UsageError
from align.registry import open_registry
from align.registry.upkeep import examine
from align.schema import Message, assistant, user

NAMES = ("red@v1", "blue@v2", "green@v1")
PROMPTS = [[user(f"Question {number}")] for number in range(6)]


def make_review(models: int = 2, prompts=PROMPTS, *, seed: int = 0, reward: bool = False) -> Review:
    contestants = tuple(Contestant(name, f"sha256:{name}") for name in NAMES[:models])
    judge = Contestant("judge@v1") if reward else None
    setup = Setup(contestants, True, {"reference": "base@v1"}, "9.9", judge)
    return Review(prompts, setup, Sampling(max_new_tokens=20, stop=("END",)), seed, "my prompts")


def make_engine(reply=None, **more) -> FakeEngine:
    return FakeEngine(list(NAMES), reply or (lambda row: f"{row.model} on {row.messages[-1]['content']}"), **more)


def open_queue(folder, review: Review | None = None) -> ReviewQueue:
    return ReviewQueue(review or make_review(), folder / "reviews", VoteStore(folder / "votes"))


@pytest.fixture
def queue(tmp_path) -> ReviewQueue:
    queue = open_queue(tmp_path)
    assert queue.generate(make_engine()) == []
    return queue


def judge_all(queue: ReviewQueue, voter: str, choice: str = "a", most: int = 100) -> list[str]:
    """The questions a voter was shown, in order."""
    shown = []
    while len(shown) < most and (battle := queue.next(voter)) is not None:
        shown.append(battle.panes[0].messages[-2]["content"])
        queue.vote(battle, choice, battle.nonce)
    return shown


def test_answers_are_written_first_and_then_judged_one_after_the_other(tmp_path, queue):
    assert queue.written == (12, 12)
    assert queue.progress("ann") == (0, 6)

    shown = judge_all(queue, "ann")

    assert sorted(shown) == [f"Question {number}" for number in range(6)]
    assert queue.progress("ann") == (6, 6)
    assert queue.next("ann") is None
    rows = read_votes(tmp_path / "votes")
    assert len(rows) == 6
    for row in rows:
        question = row["prompt"][0]["content"]
        assert [row[side] for side in "ab"] == [[assistant(f"{row['models'][side]} on {question}")] for side in "ab"]
        assert (row["mode"], row["voter"], row["truncated"]) == ("blind", "ann", False)
        assert row["digests"] == {side: f"sha256:{row['models'][side]}" for side in "ab"}
        assert row["sampling"]["stop"] == ["END"]
        assert row["review"]["key"] == queue.folder.name


def test_votes_of_a_review_are_training_data(tmp_path, queue):
    judge_all(queue, "ann")

    found = load_records("votes:voter=ann", view="preference", roots={"registry": tmp_path})

    assert found.rows == 6


def test_a_prompt_of_several_turns_is_context_that_both_share(tmp_path):
    talk = [Message(role="system", content="Be brief."), user("One"), assistant("Reply"), user("Two")]
    queue = open_queue(tmp_path, make_review(prompts=[talk]))
    queue.generate(make_engine())
    judge_all(queue, "ann")

    [record] = load_records("votes", view="preference", roots={"registry": tmp_path}).records

    assert record.prompt == talk
    assert record.chosen[0]["content"].endswith("on Two")


def test_every_two_of_three_models_meet_on_every_prompt(tmp_path):
    queue = open_queue(tmp_path, make_review(3))
    queue.generate(make_engine())

    judge_all(queue, "ann")

    rows = [row for row in read_votes(tmp_path / "votes") if not is_repeat(row)]
    met = [frozenset(row["models"].values()) for row in rows]
    assert len(met) == 18
    assert all(met.count(frozenset(pair)) == 6 for pair in (NAMES[:2], NAMES[1:], NAMES[::2]))


def test_sides_are_drawn_and_stay_as_they_were_drawn(tmp_path):
    review = make_review(prompts=[[user(str(number))] for number in range(200)])
    queue = open_queue(tmp_path, review)
    queue.generate(make_engine())
    battles = []
    for _ in range(200):
        battles.append(battle := queue.next("ann"))
        queue.skip(battle)

    left = [battle.panes[0].contestant.reference for battle in battles]

    # 200 fair coins: 60 to 140 is over five standard deviations.
    assert 60 < left.count("red@v1") < 140
    again = ReviewQueue(queue.review, queue.folder.parent, VoteStore(tmp_path / "other"))
    assert [battle.panes[0].contestant.reference for battle in (again.next("ann"),)] == left[:1]


def test_two_voters_judge_everything_in_orders_of_their_own(tmp_path):
    queue = open_queue(tmp_path, make_review(prompts=[[user(str(number))] for number in range(30)]))
    queue.generate(make_engine())

    first, second = judge_all(queue, "ann"), judge_all(queue, "ben")

    assert set(first) == set(second)
    assert first != second
    rows = [row for row in read_votes(tmp_path / "votes") if not is_repeat(row)]
    assert len({row["id"] for row in rows}) == 60


def test_a_voter_goes_on_where_they_stopped_without_any_engine(tmp_path, queue):
    before = judge_all(queue, "ann", most=2)

    again = ReviewQueue(queue.review, queue.folder.parent, VoteStore(tmp_path / "votes"))

    assert again.progress("ann") == (2, 6)
    after = judge_all(again, "ann")
    assert sorted(before + after) == [f"Question {number}" for number in range(6)]


def test_the_same_review_is_the_same_queue_and_another_is_another(tmp_path, queue):
    engine = make_engine(lambda row: pytest.fail("everything is written"))

    again = open_queue(tmp_path)

    assert again.folder == queue.folder
    assert again.generate(engine) == []
    assert open_queue(tmp_path, make_review(seed=1)).folder != queue.folder
    assert open_queue(tmp_path, make_review(3)).written == (0, 18)


def test_a_prompt_given_twice_is_reviewed_once(tmp_path):
    assert open_queue(tmp_path, make_review(prompts=[PROMPTS[0], PROMPTS[1], PROMPTS[0]])).written == (0, 4)


def test_an_undecided_comparison_comes_again_and_a_skipped_one_last(queue):
    first = queue.next("ann")
    assert queue.next("ann").review == first.review

    queue.skip(first)
    second = queue.next("ann")
    assert second.review != first.review
    rest = judge_all(queue, "ann")

    assert rest[-1] == first.panes[0].messages[0]["content"]
    assert len(rest) == 6


def test_one_comparison_in_two_windows_is_judged_once(tmp_path, queue):
    one, other = queue.next("ann"), queue.next("ann")
    queue.vote(one, "a", one.nonce)

    for window in (one, other):
        with pytest.raises(ActionRefused, match="voted_already"):
            queue.vote(window, "b", window.nonce)

    assert [row["choice"] for row in read_votes(tmp_path / "votes")] == ["a"]


def test_a_vote_needs_the_nonce_and_a_comparison_of_the_queue(queue):
    battle = queue.next("ann")

    with pytest.raises(ActionRefused, match="nothing_to_judge"):
        queue.vote(battle, "a", "another")
    with pytest.raises(ActionRefused, match="nothing_to_judge"):
        queue.vote(None, "a", "")
    queue.vote(battle, "a", battle.nonce)


def test_the_voter_is_who_it_was_handed_out_to(tmp_path, queue):
    battle = queue.next("ann")

    queue.vote(battle, "a", battle.nonce, VoteDetails("short", ("concise",), "mallory"))

    [row] = read_votes(tmp_path / "votes")
    assert (row["voter"], row["reason"], row["tags"]) == ("ann", "short", ["concise"])


def test_a_prompt_one_model_failed_on_waits_until_it_was_written(tmp_path):
    queue = open_queue(tmp_path)
    fails = make_engine(
        lambda row: None if (row.model, row.messages[-1]["content"]) == ("blue@v2", "Question 3") else "fine"
    )

    problems = queue.generate(fails)

    assert len(problems) == 1
    assert "blue@v2" in problems[0]
    assert (queue.written, queue.progress("ann")) == ((11, 12), (0, 5))
    assert queue.generate(make_engine()) == []
    assert queue.progress("ann") == (0, 6)


def test_a_busy_engine_is_asked_again(tmp_path):
    engine = make_engine(max_waiting_rows=16)
    queue = open_queue(tmp_path, make_review(prompts=[[user(str(number))] for number in range(20)]))

    assert queue.generate(engine) == []
    assert queue.written == (40, 40)


def test_progress_of_writing_is_told(tmp_path):
    told = []

    open_queue(tmp_path).generate(make_engine(), lambda done, total: told.append((done, total)))

    assert told == [(done, 12) for done in range(13)]


def test_scores_are_taken_while_writing_and_kept_with_the_vote(tmp_path, capsys):
    def score(messages) -> float:
        if "Question 5" in messages[-1]["content"]:
            raise MachineError("no memory")
        return float(messages[-1]["content"].startswith("red"))

    queue = open_queue(tmp_path, make_review(reward=True))
    queue.generate(make_engine(score=score))
    judge_all(ReviewQueue(queue.review, queue.folder.parent, VoteStore(tmp_path / "votes")), "ann")

    for row in read_votes(tmp_path / "votes"):
        scored = {side: float(model == "red@v1") for side, model in row["models"].items()}
        assert row.get("scores") == (None if row["prompt"] == PROMPTS[5] else scored)
    assert "no memory" in capsys.readouterr().err


def test_a_torn_answer_is_written_anew(tmp_path, queue):
    [shard] = (queue.folder / "answers").iterdir()
    shard.write_bytes(shard.read_bytes()[:-30])

    again = open_queue(tmp_path)

    assert again.written == (11, 12)
    assert again.generate(make_engine()) == []
    assert again.written == (12, 12)


WRITING = """
import pathlib, sys, time
sys.path[:0] = sys.argv[2:]
from test_review_queue import make_engine, make_review, open_queue
from align.schema import user

queue = open_queue(pathlib.Path(sys.argv[1]), make_review(prompts=[[user(str(n))] for n in range(200)]))
enough = queue.written[0] + 150

def tell(done, total):
    print(done, flush=True)
    if done == enough:  # however long the test looks away, this process does not end by itself
        time.sleep(600)

queue.generate(make_engine(seconds_per_word=0.002), tell)
"""


def test_killed_while_writing_no_counted_answer_is_lost_and_the_rest_is_written_later(tmp_path, request):
    here = str(request.path.parent)
    counts = []
    for _ in range(2):
        command = [sys.executable, "-c", WRITING, str(tmp_path), here, str(request.path.parents[1])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with process:
            start = int(process.stdout.readline())
            while (counted := int(process.stdout.readline())) < start + 40:
                pass
            process.send_signal(signal.SIGKILL)
            counted = max([counted, *(int(line) for line in process.stdout.read().split())])
        counts.append((start, counted))

    review = make_review(prompts=[[user(str(number))] for number in range(200)])
    queue = open_queue(tmp_path, review)

    assert counts[0][0] == 0
    # An answer may be on the disk without having been told.
    assert counts[0][1] <= counts[1][0] <= counts[0][1] + 1
    assert counts[1][1] <= queue.written[0] <= counts[1][1] + 1
    assert queue.generate(make_engine()) == []
    assert queue.written == (400, 400)
    shards = [shard.read_text() for shard in (queue.folder / "answers").iterdir()]
    lines = [json.loads(line) for shard in shards for line in shard.splitlines()]
    assert len({(line["prompt"], line["model"]) for line in lines}) == len(lines) == 400


def test_the_real_engine_writes_in_a_queue_what_it_writes_alone(tmp_path, engine):
    prompts = [[user(f"Question {number} " + "and more " * number)] for number in range(5)]
    contestants = tuple(map(Contestant, engine.models[:2]))
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    queue = open_queue(tmp_path, Review(prompts, Setup(contestants, True), sampling, seed=3, name="real"))

    assert queue.generate(engine) == []

    for _ in prompts:
        battle = queue.next("ann")
        number = prompts.index(battle.panes[0].messages[:-1])
        for pane in battle.panes:
            [alone] = engine.complete([Row(pane.contestant.reference, prompts[number], 3 + number)], sampling)
            assert pane.messages[-1]["content"] == alone
        queue.vote(battle, "tie", battle.nonce)


def test_no_prompts_and_one_model_are_told(tmp_path):
    with pytest.raises(DataError, match="0 prompts to review"):
        open_queue(tmp_path, make_review(prompts=[]))
    with pytest.raises(UsageError, match="compares at least 2"):
        open_queue(tmp_path, make_review(1))


def test_reviews_are_the_registrys_own(tmp_path, queue):
    registry = open_registry(tmp_path)

    assert queue.folder.parent == registry.reviews_dir
    assert examine(registry) == []
