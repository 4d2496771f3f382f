"""What was voted on the page trains in the next command."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import FakeEngine

from align import dpo, kto, reward
from align.arena.battles import Arena
from align.arena.votes import VoteStore
from align.compare import make_setup
from align.data import load_records
from align.engine.protocol import Sampling
from align.registry import Registry
from align.training.command import main

FIRST, SECOND, BASE = "crimson-sft", "azure-dpo", "granite-base"


def judge(arena: Arena, prompt: str, choice: str, seed: int) -> None:
    async def follow() -> None:
        async for _ in arena.frames(battle):
            pass

    sound = False
    while not sound:  # a random model may write a zero byte, which training refuses; a blind seed is salted anyhow
        battle = arena.new_battle()
        arena.ask(battle, prompt, arena.new_turn(Sampling(temperature=1.0, max_new_tokens=16), seed))
        asyncio.run(follow())
        sound = all(pane.answer.strip() and "\0" not in pane.answer for pane in battle.panes)
    arena.vote(battle, choice, battle.nonce)


def test_votes_train_dpo(contest: Registry, engine, capsys):
    setup = make_setup([contest.resolve(FIRST), contest.resolve(SECOND)], contest.resolve(BASE), True)
    arena = Arena(engine, setup, VoteStore(contest.votes_dir))
    for index, choice in enumerate(["a", "b", "a", "b", "tie", "bad"]):
        judge(arena, f"question {index}", choice, seed=index)

    code = main(
        dpo.STAGE,
        [
            f"model={FIRST}",
            "data=votes",
            "name=voted",
            "max_steps=2",
            "per_device_train_batch_size=2",
            "--registry",
            str(contest.root),
        ],
    )

    assert code == 0, capsys.readouterr().err
    manifest = contest.resolve("voted").manifest
    [votes] = manifest["data"]
    assert (votes["name"], votes["rows"]) == ("votes", 4), votes
    assert sum(votes["dropped"].values()) == 2
    assert manifest["parents"][0]["reference"] == f"{FIRST}@v1"
    # What was voted on and what was trained were written by one chat template over one base.
    assert setup.base["template"] == manifest["template_digest"]
    assert setup.base["digests"] == manifest["base"]["digests"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rows"), [(reward, 3), (kto, 8)])
def test_votes_train_every_preference_stage(contest: Registry, capsys, tmp_path, stage, rows):
    setup = make_setup([contest.resolve(FIRST), contest.resolve(SECOND)], contest.resolve(BASE), True)
    speaker = FakeEngine([one.reference for one in setup.contestants], lambda row: f"{row.model}: {row.seed}")
    arena = Arena(speaker, setup, VoteStore(tmp_path / "votes"))
    for index, choice in enumerate(["a", "b", "a", "tie", "bad"]):
        judge(arena, f"question {index}", choice, seed=index)
    data = f"{tmp_path / 'votes'}:format=votes,mode=blind,since=2020-01-01"
    settings = [f"model={FIRST}", f"data={data}", f"name=voted-{stage.STAGE.name}", "max_steps=2"]

    code = main(stage.STAGE, [*settings, "per_device_train_batch_size=2", "--registry", str(contest.root)])

    assert code == 0, capsys.readouterr().err
    manifest = contest.resolve(f"voted-{stage.STAGE.name}").manifest
    assert manifest["data"][0]["rows"] == rows


def test_an_answer_with_a_zero_byte_leaves_its_vote_out_and_counted(tmp_path):
    votes = tmp_path / "votes"
    votes.mkdir()
    rows = [vote("fine"), vote("not\0fine")]
    (votes / "shard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = load_records("votes", view="preference", roots={"registry": tmp_path})

    assert (found.rows, found.dropped) == (1, {"vote: an answer holds what is no text": 1})


def vote(answer: str) -> dict:
    prompt = [{"role": "user", "content": "question"}]
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("a", answer), ("b", "other"))}
    return {"id": answer, "prompt": prompt, "choice": "a", **sides}
