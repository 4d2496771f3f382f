from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
from collections import Counter

import pytest
from fake_engine import FakeEngine

from align.arena import battle_view
from align.arena.battles import ActionRefused, Arena, Battle, Contestant, Setup
from align.arena.ranking import leaderboard
from align.arena.votes import VoteDetails, VoteStore
from align.data import load_records
from align.engine.protocol import Row, Sampling
from align.errors import MachineError
from align.schema import assistant, user

MODELS = ("crimson@v1", "azure@v2", "granite@v1", "olive@v3")
SAMPLING = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=50)


def make_arena(folder, models: int = 2, *, blind: bool = False, reply=None, seed: int = 0) -> Arena:
    contestants = tuple(Contestant(name, f"sha256:{name}") for name in MODELS[:models])
    setup = Setup(contestants, blind, {"reference": "granite@v1", "digests": {"weights": "sha256:w"}}, "9.9")
    engine = FakeEngine(list(MODELS), reply or (lambda row: f"{row.model} says {row.messages[-1]['content']}"))
    return Arena(engine, setup, VoteStore(folder / "votes"), random.Random(seed))


def ask(arena: Arena, battle: Battle, prompt: str, *, seed: int | None = 1, system: str = "") -> None:
    arena.ask(battle, prompt, arena.new_turn(SAMPLING, seed), system)
    finish(arena, battle)


def finish(arena: Arena, battle: Battle) -> None:
    async def follow() -> None:
        async for _ in arena.frames(battle):
            pass

    asyncio.run(follow())


def rows(arena: Arena) -> list[dict]:
    path = arena.votes.path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_vote_holds_all_that_is_needed_to_trust_it(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    ask(arena, battle, " Hello? ", seed=7, system="Be short.")

    arena.vote(battle, "b", battle.nonce)

    [row] = rows(arena)
    assert row["prompt"] == [{"role": "system", "content": "Be short."}, user("Hello?")]
    assert row["a"] == [assistant("crimson@v1 says Hello?")]
    assert row["b"] == [assistant("azure@v2 says Hello?")]
    assert row["choice"] == "b"
    assert row["models"] == {"a": "crimson@v1", "b": "azure@v2"}
    assert row["digests"] == {"a": "sha256:crimson@v1", "b": "sha256:azure@v2"}
    assert row["base"] == {"reference": "granite@v1", "digests": {"weights": "sha256:w"}}
    assert row["sampling"].items() >= {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 50}.items()
    assert (row["seed"], row["sides"], row["mode"], row["app_version"]) == (7, {"a": 0, "b": 1}, "named", "9.9")
    assert row["turns"][0]["a"]["reason"] == "stop"
    assert row["id"].startswith(row["battle"])
    assert row["time"].endswith("+00:00")


def test_votes_are_preference_data_with_ties_and_refusals_counted(tmp_path):
    arena = make_arena(tmp_path)
    for index, choice in enumerate(("a", "b", "tie", "bad")):
        battle = arena.new_battle()
        ask(arena, battle, f"Question {index}")
        arena.vote(battle, choice, battle.nonce)

    read = load_records("votes", view="preference", roots={"registry": tmp_path})

    assert [record.chosen for record in read.records] == [
        [assistant("crimson@v1 says Question 0")],
        [assistant("azure@v2 says Question 1")],
    ]
    assert sum(read.dropped.values()) == 2


def test_a_vote_on_several_turns_is_kept_whole_and_left_out_of_training(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    ask(arena, battle, "One")
    ask(arena, battle, "Two")

    arena.vote(battle, "a", battle.nonce)

    [row] = rows(arena)
    assert row["prompt"] == [user("One")]
    assert row["a"] == [assistant("crimson@v1 says One"), user("Two"), assistant("crimson@v1 says Two")]
    assert [turn["seed"] for turn in row["turns"]] == [1, 1]
    assert row["comparable"] is False
    single = arena.new_battle()
    ask(arena, single, "Three")
    arena.vote(single, "a", single.nonce)
    read = load_records("votes", view="preference", roots={"registry": tmp_path})
    assert [record.prompt for record in read.records] == [[user("Three")]]
    assert read.dropped == {"vote: several turns": 1}


def test_each_pane_continues_its_own_history(tmp_path):
    seen = []

    def reply(row: Row) -> str:
        seen.append(row)
        return f"{row.model} {len(row.messages)}"

    arena = make_arena(tmp_path, reply=reply)
    battle = arena.new_battle()
    ask(arena, battle, "One")
    ask(arena, battle, "Two")

    assert seen[-1].messages == [user("One"), assistant("azure@v2 1"), user("Two")]


def test_a_vote_counts_once_and_only_for_the_answers_it_was_made_for(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    with pytest.raises(ActionRefused, match="nothing_to_judge"):
        arena.vote(battle, "a", "")
    ask(arena, battle, "One")
    old = battle.nonce
    ask(arena, battle, "Two")
    with pytest.raises(ActionRefused, match="nothing_to_judge"):
        arena.vote(battle, "a", old)

    arena.vote(battle, "a", battle.nonce)

    with pytest.raises(ActionRefused, match="voted_already"):
        arena.vote(battle, "a", battle.nonce)
    assert len(rows(arena)) == 1


def test_the_best_of_four_beats_each_of_the_others(tmp_path):
    arena = make_arena(tmp_path, 4)
    battle = arena.new_battle()
    ask(arena, battle, "Hello")

    arena.vote(battle, "c", battle.nonce)

    written = rows(arena)
    assert [(row["models"]["a"], row["models"]["b"], row["choice"]) for row in written] == [
        ("crimson@v1", "granite@v1", "b"),
        ("azure@v2", "granite@v1", "b"),
        ("granite@v1", "olive@v3", "a"),
    ]
    assert len({row["id"] for row in written}) == 3


def test_four_answers_none_of_which_is_good_are_no_ties(tmp_path):
    arena = make_arena(tmp_path, 4)
    for number in range(10):
        battle = arena.new_battle()
        ask(arena, battle, f"Hello {number}")
        arena.vote(battle, "bad", battle.nonce)

    board = leaderboard(rows(arena))

    assert {(one.wins, one.ties, one.losses, one.votes, one.bad) for one in board.standings} == {(0, 0, 0, 0, 30)}
    assert all(one.strength is None for one in board.standings)
    assert [remark.values for remark in board.warnings if remark.key == "none_good"] == [{"votes": 10}]


@pytest.mark.parametrize("blind", [True, False])
def test_the_same_question_and_seed_give_equal_answers_only_where_names_are_shown(tmp_path, blind):
    arena = make_arena(tmp_path, blind=blind, reply=lambda row: f"{row.model} {row.seed}")
    battles = [arena.new_battle() for _ in range(2)]
    for battle in battles:
        ask(arena, battle, "Hello", seed=7)

    answers = [{pane.contestant.reference: pane.answer for pane in battle.panes} for battle in battles]

    assert (answers[0] == answers[1]) is not blind
    assert [battle.turns[0].seed == 7 for battle in battles] == [not blind] * 2
    assert all(pane.answer.endswith(f" {battle.turns[0].seed}") for battle in battles for pane in battle.panes)


def test_the_seed_of_a_blind_answer_is_told_after_the_vote_only(tmp_path):
    arena = make_arena(tmp_path, blind=True)
    battle = arena.new_battle()
    ask(arena, battle, "Hello", seed=7)
    seed = str(battle.turns[0].seed)

    assert seed not in battle_view.status(battle, arena.setup, "en")
    arena.vote(battle, "a", battle.nonce)
    assert seed in battle_view.status(battle, arena.setup, "en")
    assert rows(arena)[0]["seed"] == int(seed)


def test_a_tie_of_three_is_between_every_two(tmp_path):
    arena = make_arena(tmp_path, 3)
    battle = arena.new_battle()
    ask(arena, battle, "Hello")

    arena.vote(battle, "tie", battle.nonce)

    assert [(row["sides"], row["choice"]) for row in rows(arena)] == [
        ({"a": 0, "b": 1}, "tie"),
        ({"a": 0, "b": 2}, "tie"),
        ({"a": 1, "b": 2}, "tie"),
    ]


def test_blind_battles_draw_two_contestants_and_their_sides_evenly(tmp_path):
    arena = make_arena(tmp_path, 3, blind=True)

    drawn = Counter(tuple(pane.contestant.reference for pane in arena.new_battle().panes) for _ in range(600))

    # Six ordered pairs, a hundred each on average; 60 to 140 is over four standard deviations.
    assert len(drawn) == 6
    assert all(60 < count < 140 for count in drawn.values())


def test_regenerating_takes_another_seed_and_forgets_the_answer(tmp_path):
    seeds = []

    def reply(row: Row) -> str:
        seeds.append(row.seed)
        return f"seed {row.seed}"

    arena = make_arena(tmp_path, reply=reply)
    battle = arena.new_battle()
    ask(arena, battle, "Hello", seed=5)
    for _ in range(2):
        arena.ask_again(battle, arena.new_turn(SAMPLING, 5))
        finish(arena, battle)

    assert seeds == [5, 5, 6, 6, 7, 7]
    assert battle.panes[0].messages == [user("Hello"), assistant("seed 7")]
    assert [turn.regenerated for turn in battle.turns] == [2]


def test_without_a_seed_one_is_drawn_and_recorded(tmp_path):
    arena = make_arena(tmp_path)

    first, second = (arena.new_turn(SAMPLING, None).seed for _ in range(2))

    assert first != second


def test_a_failed_pane_keeps_the_others_and_cannot_be_judged(tmp_path, capsys):
    arena = make_arena(tmp_path, blind=True, reply=lambda row: None if row.model == "azure@v2" else "fine")
    battle = arena.new_battle()
    ask(arena, battle, "Hello")

    assert battle.phase == "failed"
    assert sorted(pane.answer for pane in battle.panes) == ["", "fine"]
    with pytest.raises(ActionRefused, match="nothing_to_judge"):
        arena.vote(battle, "a", battle.nonce)
    with pytest.raises(ActionRefused, match="failed"):
        arena.ask(battle, "More", arena.new_turn(SAMPLING, 1))
    # The engine's message names the model: it belongs in the log, not on a blind page.
    shown = str([battle_view.pane_messages(pane, "en") for pane in battle.panes])
    assert "azure" not in shown + battle_view.status(battle, arena.setup, "en")
    assert "azure@v2" in capsys.readouterr().err


LONG = Sampling(max_new_tokens=2000)


def talkative(folder, **more) -> Arena:
    """Answers whose end is minutes away."""
    arena, asked = make_arena(folder, reply=lambda row: "word " * 2000, **more), itertools.count(1)
    arena.engine._pause = 0.002
    arena.engine._holds = lambda row, words: words >= 100 and next(asked) % 51 != 0
    return arena


def test_stopped_answers_stay_and_can_be_judged(tmp_path):
    arena = talkative(tmp_path)
    battle = arena.new_battle()
    arena.ask(battle, "Talk", arena.new_turn(LONG, 1))

    async def follow() -> None:
        async for _ in arena.frames(battle):
            arena.stop(battle)

    asyncio.run(follow())
    arena.vote(battle, "a", battle.nonce)

    [row] = rows(arena)
    assert row["turns"][0]["a"]["reason"] == row["turns"][0]["b"]["reason"] == "cancelled"
    assert 0 < len(row["a"][0]["content"].split()) < 2000


def test_a_visitor_who_leaves_stops_the_answers(tmp_path):
    arena = talkative(tmp_path)
    battle = arena.new_battle()
    arena.ask(battle, "Talk", arena.new_turn(LONG, 1))

    async def leave() -> None:
        frames = arena.frames(battle)
        await anext(frames)
        await frames.aclose()

    asyncio.run(leave())

    assert battle.handle.is_cancelled(0)
    assert battle.handle.is_cancelled(1)


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_question_is_refused(tmp_path, prompt):
    arena = make_arena(tmp_path)

    with pytest.raises(ActionRefused, match="empty"):
        arena.ask(arena.new_battle(), prompt, arena.new_turn(SAMPLING, 1))


def test_text_no_file_can_hold_is_mended(tmp_path):
    arena = make_arena(tmp_path, reply=lambda row: "ok")
    battle = arena.new_battle()
    ask(arena, battle, "half \ud83d emoji")

    arena.vote(battle, "a", battle.nonce)

    assert rows(arena)[0]["prompt"] == [user("half ? emoji")]


@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_names_and_speeds_stay_hidden_until_a_blind_vote(tmp_path, language):
    arena = make_arena(tmp_path, blind=True, reply=lambda row: "same")
    battle = arena.new_battle()
    ask(arena, battle, "Hello")

    def shown() -> str:
        labels = [battle_view.pane_label(battle, place, arena.setup) for place in (0, 1)]
        return " ".join([*labels, battle_view.status(battle, arena.setup, language)])

    before = shown()
    arena.vote(battle, "a", battle.nonce)

    assert not any(name in before for name in (*MODELS, "ms", "毫秒", "second"))
    assert all(name in shown() for name in MODELS[:2])


def follow_until(arena: Arena, battle: Battle, act) -> None:
    """Follow the answers and act once both panes show something; then to their end."""

    async def follow() -> None:
        acted = False
        async for _ in arena.frames(battle):
            if not acted and battle.votable:
                acted = True
                await asyncio.to_thread(act)

    asyncio.run(follow())


def test_an_early_vote_stops_both_answers_and_keeps_what_was_shown(tmp_path):
    arena = talkative(tmp_path, blind=True)
    battle = arena.new_battle()
    arena.ask(battle, "Talk", arena.new_turn(LONG, 1))
    shown = []

    def vote() -> None:
        arena.vote(battle, "b", battle.nonce)
        shown.extend(pane.messages[-1]["content"] for pane in battle.panes)

    follow_until(arena, battle, vote)

    [row] = rows(arena)
    assert (row["truncated"], row["choice"]) == (True, "b")
    assert [row["a"][0]["content"], row["b"][0]["content"]] == shown
    assert 0 < len(shown[0].split()) < 2000
    assert all(battle.handle.is_cancelled(place) for place in (0, 1))
    # What came in after the vote changed nothing, and the page shows each answer once.
    assert [pane.messages[-1]["content"] for pane in battle.panes] == shown
    assert [len(pane.shown()) for pane in battle.panes] == [2, 2]
    assert battle.phase == "voted"


def test_an_answer_that_has_not_begun_cannot_be_judged(tmp_path):
    arena = talkative(tmp_path)
    battle = arena.new_battle()
    arena.ask(battle, "Talk", arena.new_turn(LONG, 1))

    assert not battle.votable
    with pytest.raises(ActionRefused, match="nothing_to_judge"):
        arena.vote(battle, "a", battle.nonce)
    arena.stop(battle)


def test_a_disk_that_fails_an_early_vote_leaves_it_to_be_given_again(tmp_path, monkeypatch):
    arena = talkative(tmp_path)
    battle = arena.new_battle()
    arena.ask(battle, "Talk", arena.new_turn(LONG, 1))
    nonce = battle.nonce

    def vote() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(arena.votes, "append", lambda rows: (_ for _ in ()).throw(MachineError("full")))
            with pytest.raises(MachineError, match="full"):
                arena.vote(battle, "a", nonce)

    follow_until(arena, battle, vote)
    arena.vote(battle, "a", nonce)

    [row] = rows(arena)
    assert row["truncated"] is True


def test_answers_of_a_turn_that_was_written_anew_change_nothing(tmp_path):
    arena = talkative(tmp_path)
    battle = arena.new_battle()
    arena.ask(battle, "Talk", arena.new_turn(LONG, 1))

    async def both() -> None:
        old = arena.frames(battle)
        await anext(old)
        arena.stop(battle)
        battle.end_turn(battle.turns[-1])
        arena.engine._reply = lambda row: "new"
        arena.ask_again(battle, arena.new_turn(SAMPLING, 1))
        await asyncio.gather(drain(old), drain(arena.frames(battle)))

    asyncio.run(both())

    assert [pane.answer for pane in battle.panes] == ["new", "new"]
    assert battle.turns[-1].truncated is False


async def drain(frames) -> None:
    async for _ in frames:
        pass


def test_a_whole_answer_is_not_truncated_and_the_turn_is_counted(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    ask(arena, battle, "One")
    ask(arena, battle, "Two")
    arena.vote(battle, "a", battle.nonce)

    assert (rows(arena)[0]["truncated"], rows(arena)[0]["turn"]) == (False, 1)


def test_reason_tags_and_pseudonym_are_kept_clean(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    ask(arena, battle, "Hello")
    given = VoteDetails(
        " half \ud83d emoji " + "x" * 3000, (" Clear\n", "Clear", "", "a\x1b[2Jb", *"defghijk"), "  an\tna "
    )

    arena.vote(battle, "a", battle.nonce, given)

    [row] = rows(arena)
    assert row["reason"].startswith("half ? emoji x")
    assert len(row["reason"]) == 2000
    assert row["tags"] == ["Clear", "a [2Jb", *"defghi"]
    assert row["voter"] == "an na"


def test_a_vote_without_an_opinion_says_so(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    ask(arena, battle, "Hello")
    arena.vote(battle, "a", battle.nonce)

    assert [rows(arena)[0][key] for key in ("voter", "reason", "tags")] == ["", "", []]


def test_a_full_queue_refuses_the_question_and_keeps_the_conversation(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    ask(arena, battle, "One")
    arena.engine._most = 1

    with pytest.raises(ActionRefused, match="queue_full"):
        arena.ask(battle, "Two", arena.new_turn(SAMPLING, 1))

    assert battle.phase == "answered"
    assert [len(pane.messages) for pane in battle.panes] == [2, 2]
    arena.vote(battle, "a", battle.nonce)


def test_nothing_more_is_asked_in_a_closed_battle(tmp_path):
    arena = make_arena(tmp_path)
    battle = arena.new_battle()
    ask(arena, battle, "One")
    arena.vote(battle, "a", battle.nonce)

    with pytest.raises(ActionRefused, match="voted_already"):
        arena.ask(battle, "Two", arena.new_turn(SAMPLING, 1))


def test_the_reward_models_scores_are_kept_with_the_vote(tmp_path):
    arena = make_arena(tmp_path, 3)
    arena.setup = dataclasses.replace(arena.setup, reward=Contestant("judge@v1", "sha256:j"))
    arena.engine._score = lambda messages: float(len(messages[-1]["content"]))
    battle = arena.new_battle()
    ask(arena, battle, "Hi")

    arena.vote(battle, "b", battle.nonce)

    first, second = rows(arena)
    texts = ["crimson@v1 says Hi", "azure@v2 says Hi", "granite@v1 says Hi"]
    assert first["scores"] == {"a": len(texts[0]), "b": len(texts[1])}
    assert second["scores"] == {"a": len(texts[1]), "b": len(texts[2])}
    assert first["reward_model"] == {"reference": "judge@v1", "digest": "sha256:j"}


@pytest.mark.parametrize("failure", [MachineError("no memory"), RuntimeError("no memory")])
def test_a_reward_model_that_fails_costs_no_vote(tmp_path, capsys, failure):
    arena = make_arena(tmp_path)
    arena.setup = dataclasses.replace(arena.setup, reward=Contestant("judge@v1"))
    arena.engine._score = lambda messages: (_ for _ in ()).throw(failure)
    battle = arena.new_battle()
    ask(arena, battle, "Hi")

    arena.vote(battle, "b", battle.nonce)

    assert "scores" not in rows(arena)[0]
    assert "the answers have no scores: no memory" in capsys.readouterr().err
