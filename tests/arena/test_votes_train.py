"""What was voted on the page trains in the next command."""

from __future__ import annotations

import asyncio

from align import dpo
from align.arena.battles import Arena
from align.arena.votes import VoteStore
from align.compare import describe
from align.engine.protocol import Sampling
from align.registry import Registry
from align.training.stage import main

FIRST, SECOND, BASE = "crimson-sft", "azure-dpo", "granite-base"


def judge(arena: Arena, prompt: str, choice: str) -> None:
    async def follow() -> None:
        async for _ in arena.frames(battle):
            pass

    battle = arena.new_battle()
    arena.ask(battle, prompt, arena.new_turn(Sampling(temperature=1.0, max_new_tokens=16), None))
    asyncio.run(follow())
    arena.vote(battle, choice, battle.nonce)


def test_votes_train_dpo(contest: Registry, engine, capsys):
    setup = describe([contest.resolve(FIRST), contest.resolve(SECOND)], contest.resolve(BASE), True)
    arena = Arena(engine, setup, VoteStore(contest.votes_dir))
    for index, choice in enumerate(["a", "b", "a", "b", "tie", "bad"]):
        judge(arena, f"question {index}", choice)

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
    assert (votes["name"], votes["rows"]) == ("votes", 4)
    assert sum(votes["dropped"].values()) == 2
    assert manifest["parents"][0]["reference"] == f"{FIRST}@v1"
