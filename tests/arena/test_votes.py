from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from align.arena.votes import VoteStore, read_votes
from align.errors import DataError, MachineError


def lines(store: VoteStore) -> list[dict]:
    return [json.loads(line) for line in store.path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_appended_as_lines(tmp_path):
    store = VoteStore(tmp_path / "votes")

    store.append([{"id": "1"}])
    store.append([{"id": "2", "text": "退款\n👍"}, {"id": "3"}])

    assert [row["id"] for row in lines(store)] == ["1", "2", "3"]
    assert lines(store)[1]["text"] == "退款\n👍"


def test_two_pages_never_share_a_file(tmp_path):
    assert VoteStore(tmp_path).path != VoteStore(tmp_path).path


def test_nothing_is_created_without_a_vote(tmp_path):
    VoteStore(tmp_path / "votes")

    assert not (tmp_path / "votes").exists()


def test_concurrent_votes_are_whole_lines(tmp_path):
    store = VoteStore(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: store.append([{"id": index, "pad": "x" * 5000}]), range(40)))

    assert sorted(row["id"] for row in lines(store)) == list(range(40))


def test_a_vote_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    calls = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_size), real(handle)))

    store = VoteStore(tmp_path)
    store.append([{"id": "1"}])

    # The file with all its bytes first, then the folder that names it.
    assert calls[0] == store.path.stat().st_size
    assert len(calls) == 2


def test_a_vote_survives_a_killed_process(tmp_path):
    code = (
        "import sys, pathlib; from align.arena.votes import VoteStore; store = VoteStore(pathlib.Path(sys.argv[1]));"
        "store.append([{'id': 'kept'}]); print('written', flush=True); import time; time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)

    [path] = tmp_path.glob("*.jsonl")
    assert json.loads(path.read_text()) == {"id": "kept"}


def test_a_full_disk_leaves_no_half_line_and_the_vote_can_be_given_again(tmp_path, monkeypatch):
    store = VoteStore(tmp_path)
    store.append([{"id": "1"}])
    real = os.write

    def full(handle, data):
        if len(data) > 4:
            return real(handle, data[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(MachineError, match="No space left on device"):
            store.append([{"id": "2"}])
    store.append([{"id": "2"}])

    assert [row["id"] for row in lines(store)] == ["1", "2"]


TESTS = Path(__file__).parents[1]

VOTING = """
import asyncio, pathlib, random, sys
sys.path.insert(0, sys.argv[2])
from align.arena.battles import Arena, Contestant, Setup
from align.arena.votes import VoteStore
from fake_engine import FakeEngine
from align.engine.protocol import Sampling

names = ["red@v1", "blue@v1"]
engine = FakeEngine(names, lambda row: f"{row.model} says {row.messages[-1]['content']} " + "word " * 500)
arena = Arena(engine, Setup(tuple(map(Contestant, names)), True), VoteStore(pathlib.Path(sys.argv[1])))

async def judge(number):
    battle = arena.new_battle()
    arena.ask(battle, f"question {number}", arena.new_turn(Sampling(), number))
    async for _ in arena.frames(battle):
        pass
    arena.vote(battle, random.choice(["a", "b", "tie", "bad"]), battle.nonce)
    print(battle.id, flush=True)

number = 0
while True:
    asyncio.run(judge(number))
    number += 1
"""


@pytest.mark.parametrize("acknowledged", [1, 25])
def test_killed_while_voting_no_acknowledged_vote_is_lost(tmp_path, acknowledged):
    process = subprocess.Popen(
        [sys.executable, "-c", VOTING, str(tmp_path), str(TESTS)], stdout=subprocess.PIPE, text=True
    )
    with process:
        told = [process.stdout.readline().strip() for _ in range(acknowledged)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().split()

    kept = [row["battle"] for row in read_votes(tmp_path)]

    assert process.returncode == -signal.SIGKILL
    # The last one may be on the disk without having been told.
    assert kept[: len(told)] == told
    assert len(kept) <= len(told) + 1


def ballot(number: int, **more) -> dict:
    row = {"id": str(number), "models": {"a": "red@v1", "b": "blue@v1"}, "choice": "a", "prompt": [], "a": [], "b": []}
    return row | {"time": f"2026-11-{number:02}T00:00:00+00:00"} | more


def test_votes_are_read_back_from_every_page_in_the_order_they_were_cast(tmp_path):
    first, second = VoteStore(tmp_path / "votes"), VoteStore(tmp_path / "votes")
    first.append([ballot(1)])
    second.append([ballot(2)])
    first.append([ballot(3), ballot(1)])

    assert [row["id"] for row in read_votes(tmp_path / "votes")] == ["1", "2", "3"]


def test_no_folder_and_an_empty_one_hold_no_votes(tmp_path):
    assert read_votes(tmp_path / "nowhere") == read_votes(tmp_path) == []


def test_a_torn_last_line_is_left_out_and_told(tmp_path):
    store = VoteStore(tmp_path)
    store.append([ballot(1)])
    with store.path.open("ab") as shard:
        shard.write('{"id": "2", "text": "退'.encode()[:-1])
    notes = []

    assert [row["id"] for row in read_votes(tmp_path, notes)] == ["1"]
    assert len(notes) == 1
    assert "line 2 is torn off at the end of the file" in notes[0]


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "2", "te',
        "12",
        '{"choice": "a"}',
        json.dumps(ballot(2, choice="c")),
        json.dumps(ballot(2, scores={"a": 1, "b": "?"})),
    ],
)
def test_any_other_line_that_is_no_vote_is_an_error_with_its_place(tmp_path, line):
    (tmp_path / "shard.jsonl").write_text(f"{line}\n{json.dumps(ballot(3))}\n")

    with pytest.raises(DataError, match=r"shard\.jsonl:1 "):
        read_votes(tmp_path)


def test_a_shard_torn_at_any_byte_gives_every_whole_line(tmp_path):
    whole = "".join(json.dumps(ballot(number, text="退款👍\\n"), ensure_ascii=False) + "\n" for number in (1, 2))
    data, shard = whole.encode(), tmp_path / "shard.jsonl"
    lines = data.splitlines(keepends=True)

    for cut in range(len(data) + 1):
        shard.write_bytes(data[:cut])
        # A line is whole with its closing brace; the line feed may be what was torn off.
        expected = sum(cut >= len(b"".join(lines[: count + 1])) - 1 for count in range(len(lines)))
        assert len(read_votes(tmp_path)) == expected, data[:cut]
