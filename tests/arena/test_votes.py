from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from align.arena.votes import VoteStore
from align.errors import MachineError


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
