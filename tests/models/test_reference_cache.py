"""The file in which log-probabilities of a reference are kept: what is read is what was written, or nothing."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy
import pytest

from align.models import reference_cache
from align.models.reference_cache import AnswerTokens, ReferenceCache, make_batches

ROWS = [(bytes([place]) * 16, float(place) / 3) for place in range(1, 41)]


def answer(*ids: int, start: int = 1) -> AnswerTokens:
    return AnswerTokens(numpy.array(ids, dtype=numpy.int32), start)


def cache_in(folder: Path) -> ReferenceCache:
    return ReferenceCache(folder, "key")


def test_what_was_added_is_read_in_single_precision(tmp_path):
    cache_in(tmp_path).add(ROWS)

    assert cache_in(tmp_path).read() == {digest: float(numpy.float32(value)) for digest, value in ROWS}
    assert ReferenceCache(tmp_path, "other").read() == {}


@pytest.mark.parametrize("cut", [1, 4, 23, 24, 25, 24 * 40 - 1, 24 * 40])
def test_a_file_that_was_cut_short_loses_only_what_was_cut(tmp_path, cut):
    cache = cache_in(tmp_path)
    cache.add(ROWS)
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[:-cut])

    known = cache.read()
    cache.add([row for row in ROWS if row[0] not in known])

    assert len(known) == (len(data) - cut) // 24
    assert cache.path.stat().st_size == len(data)
    assert cache.read().keys() == {digest for digest, _ in ROWS}


@pytest.mark.parametrize("place", [0, 17, 23, 24 * 7 + 3])
def test_a_damaged_record_is_no_record_and_is_replaced(tmp_path, place):
    cache = cache_in(tmp_path)
    cache.add(ROWS)
    data = bytearray(cache.path.read_bytes())
    data[place] ^= 4
    cache.path.write_bytes(data)

    known = cache.read()
    cache.add([row for row in ROWS if row[0] not in known])

    assert len(known) == len(ROWS) - 1
    assert cache.read() == {digest: float(numpy.float32(value)) for digest, value in ROWS}
    assert cache.path.stat().st_size == len(data)


def _fill(folder: Path, first: int) -> None:
    for number in range(50):
        cache_in(folder).add([(bytes([first, number]) * 8, first + number)])


def test_processes_that_fill_one_file_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, first)) for first in (1, 2, 3, 4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    found = cache_in(tmp_path).read()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert found == {bytes([first, number]) * 8: first + number for first in (1, 2, 3, 4) for number in range(50)}
    assert cache_in(tmp_path).path.stat().st_size == 24 * 200


def test_the_references_used_longest_ago_go(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "KEPT", 2)
    for name in ("a", "b", "c"):
        ReferenceCache(tmp_path, name).add(ROWS)
    ReferenceCache(tmp_path, "b").read()

    ReferenceCache(tmp_path, "b")

    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["b.bin", "c.bin"]


def _fill_in_turn(folder: Path, first: int) -> None:
    for number in range(60):
        cache = ReferenceCache(folder, f"key{(first + number) % 4}")
        cache.read()
        cache.add([(bytes([first, number]) * 8, float(number))])


def test_processes_that_prune_one_folder_at_once_end_well(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "KEPT", 1)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill_in_turn, args=(tmp_path, first)) for first in (1, 2, 3, 4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert [worker.exitcode for worker in workers] == [0] * 4
    assert all(path.stat().st_size % 24 == 0 for path in tmp_path.glob("*.bin"))


def test_a_reference_that_is_being_added_to_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "KEPT", 1)
    old = ReferenceCache(tmp_path, "old")
    old.add(ROWS)

    with old._locked():
        ReferenceCache(tmp_path, "new").add(ROWS)
        ReferenceCache(tmp_path, "new")
        assert old.path.is_file()
    ReferenceCache(tmp_path, "new")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.bin", "new.lock"]


def test_a_folder_that_somebody_emptied_is_made_again(tmp_path):
    cache = ReferenceCache(tmp_path / "reference", "key")
    shutil.rmtree(tmp_path / "reference")

    cache.add(ROWS)

    assert len(cache.read()) == len(ROWS)


def test_a_digest_knows_every_id_and_where_the_answer_begins():
    digests = [answer(1, 2, 3), answer(1, 2, 4), answer(1, 2), answer(1, 2, 3, start=2)]

    assert len({each.digest for each in digests}) == 4
    assert answer(1, 2, 3).digest == answer(1, 2, 3).digest


def test_batches_hold_every_answer_once_within_their_room_and_keep_a_prompt_together():
    rng = numpy.random.default_rng(0)
    answers = []
    for prompt in range(30):
        for _ in range(2):
            answers.append(answer(*[prompt] * 5, *rng.integers(0, 9, rng.integers(1, 40)), start=5))

    made = make_batches(answers, 200)

    assert sorted(place for batch in made for place in batch) == list(range(60))
    widths = [max(len(answers[place].ids) for place in batch) for batch in made]
    assert all(width * len(batch) <= 200 or len(batch) == 1 for width, batch in zip(widths, made, strict=True))
    assert widths == sorted(widths, reverse=True)
    assert (
        sum(place // 2 in {other // 2 for other in batch if other != place} for batch in made for place in batch) > 40
    )
