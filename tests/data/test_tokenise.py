"""Tokenising: once for the same content, the same rows whatever the number of processes, over-long rows by policy."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
from pathlib import Path

import pytest
from template_zoo import build

from align.data.record_sets import RecordSet, digest_records
from align.data.rendering.render_view import render_view
from align.data.tokenise import TokenPlan, tokenise
from align.errors import DataError
from align.schema import Record, assistant, user

WORDS = "the shop opens at nine and closes late 几点 开门".split()


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def record_set(records: list[Record]) -> RecordSet:
    return RecordSet(records, "made", digest_records(records), len(records))


def talks(count: int, seed: int = 0) -> RecordSet:
    rng = random.Random(seed)
    return record_set(
        [
            Record(
                prompt=[user(sentence(rng, 2, 9))],
                completion=[assistant(sentence(rng, 2, 9))],
                chosen=[assistant(sentence(rng, 2, 9) + " good")],
                rejected=[assistant(sentence(rng, 2, 9))],
                text=sentence(rng, 1, 40),
                label=rng.random() < 0.5,
            )
            for _ in range(count)
        ]
    )


@pytest.fixture(scope="module")
def tokenizer():
    return build("chatml")


VIEWS = ("demonstration", "preference", "unpaired", "prompt", "text")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_and_counts_equal_those_of_rendering_in_one_go(tmp_path, tokenizer, view, processes):
    found = talks(2300)

    ours = tokenise(found, tokenizer, TokenPlan(view, 64, "drop"), cache=tmp_path, processes=processes)

    theirs = render_view(view, found.records, tokenizer, 64)
    assert ours.rows.to_list() == theirs.rows
    assert (ours.dropped, ours.tokens, ours.trained_tokens) == (theirs.dropped, theirs.tokens, theirs.trained_tokens)
    assert ours.asked == 2300


@pytest.mark.parametrize("view", ["demonstration", "preference", "prompt"])
def test_the_share_of_repeated_prompts_is_that_of_pairs(tmp_path, tokenizer, view):
    tokens = tokenise(talks(50), tokenizer, TokenPlan(view, 64, "drop"), cache=tmp_path)

    rows = tokens.rows.to_list()
    repeated = sum(len(row["prompt_ids"]) for row in rows) if view == "preference" else 0
    assert tokens.shared_share() == repeated / tokens.lengths().sum()


def test_the_same_content_is_tokenised_once(tmp_path, tokenizer):
    plan = TokenPlan("demonstration", 64)
    first = tokenise(talks(50), tokenizer, plan, cache=tmp_path)

    again = tokenise(talks(50), build("chatml"), plan, cache=tmp_path)

    assert (first.reused, again.reused) == (False, True)
    assert again.rows.to_list() == first.rows.to_list()
    assert (again.tokens, again.dropped, again.asked) == (first.tokens, first.dropped, first.asked)


@pytest.mark.parametrize(
    ("records", "template", "plan"),
    [
        (talks(50, seed=1), "chatml", TokenPlan("demonstration", 64)),
        (talks(50), "llama3", TokenPlan("demonstration", 64)),
        (talks(50), "chatml", TokenPlan("demonstration", 63)),
        (talks(50), "chatml", TokenPlan("demonstration", 64, "truncate_left")),
        (talks(50), "chatml", TokenPlan("demonstration", 64, columns="labels")),
        (talks(50), "chatml", TokenPlan("prompt", 64)),
    ],
    ids=["data", "template", "length", "policy", "columns", "view"],
)
def test_other_content_is_tokenised_anew(tmp_path, tokenizer, records, template, plan):
    tokenise(talks(50), tokenizer, TokenPlan("demonstration", 64), cache=tmp_path)

    assert not tokenise(records, build(template), plan, cache=tmp_path).reused


def test_a_damaged_cache_is_tokenised_anew(tmp_path, tokenizer):
    plan = TokenPlan("demonstration", 64)
    rows = tokenise(talks(50), tokenizer, plan, cache=tmp_path).rows.to_list()
    path = next(tmp_path.glob("*/rows.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    again = tokenise(talks(50), tokenizer, plan, cache=tmp_path)

    assert not again.reused
    assert again.rows.to_list() == rows


def test_labels_are_the_trained_tokens_and_nothing_else(tmp_path, tokenizer):
    found = talks(20)
    plan = TokenPlan("demonstration", 64, columns="labels")

    rows = tokenise(found, tokenizer, plan, cache=tmp_path).rows

    for row, rendered in zip(rows, render_view("demonstration", found.records, tokenizer, 64).rows, strict=True):
        pairs = zip(row["input_ids"], rendered["completion_mask"], strict=True)
        assert row["labels"] == [token if trained else -100 for token, trained in pairs]


def test_joined_pairs_hold_the_prompt_before_each_answer(tmp_path, tokenizer):
    found = talks(20)

    rows = tokenise(found, tokenizer, TokenPlan("preference", 64, columns="joined"), cache=tmp_path).rows

    for row, rendered in zip(rows, render_view("preference", found.records, tokenizer, 64).rows, strict=True):
        assert row["chosen_ids"] == rendered["prompt_ids"] + rendered["chosen_ids"]
        assert row["rejected_ids"] == rendered["prompt_ids"] + rendered["rejected_ids"]
        assert row["prompt_length"] == len(rendered["prompt_ids"])


def test_a_margin_is_a_column_only_when_every_pair_has_one(tmp_path, tokenizer):
    some, every = talks(1500), talks(1500, seed=3)
    for record in some.records[:1200]:
        record.margin = 1.0
    for record in every.records:
        record.margin = 0.5
    plan = TokenPlan("preference", 64)

    assert "margin" not in tokenise(record_set(some.records), tokenizer, plan, cache=tmp_path).rows.column_names
    assert set(tokenise(record_set(every.records), tokenizer, plan, cache=tmp_path).rows["margin"]) == {0.5}


def long_ones(count: int, long: int) -> RecordSet:
    records = talks(count).records
    for record in records[:long]:
        record.prompt = [user("nine " * 200)]
    return record_set(records)


def test_over_long_rows_above_one_percent_are_refused_with_the_ways_out(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"made: 3 of 200 rows are longer than max_length=64.*on_long=drop.*truncate_left"
    ):
        tokenise(long_ones(200, 3), tokenizer, TokenPlan("demonstration", 64), cache=tmp_path)

    assert list(tmp_path.iterdir()) == []
    kept = tokenise(long_ones(200, 2), tokenizer, TokenPlan("demonstration", 64), cache=tmp_path)
    assert kept.dropped == {"longer than max_length": 2}


@pytest.mark.parametrize("view", ["demonstration", "preference", "unpaired", "prompt"])
def test_over_long_prompts_are_cut_on_the_left_and_answers_never(tmp_path, tokenizer, view):
    found = long_ones(40, 8)
    plan = TokenPlan(view, 64, "truncate_left")

    cut = tokenise(found, tokenizer, plan, cache=tmp_path)

    whole = render_view(view, found.records, tokenizer, 100_000).rows
    assert (len(cut.rows), cut.shortened, cut.dropped) == (40, 8, {})
    for row, full in zip(cut.rows, whole, strict=True):
        for key, value in full.items():
            if key in ("record", "label") or len(value) <= len(row[key]):
                assert row[key] == value
            else:
                assert row[key] == value[-len(row[key]) :]
                assert key in ("input_ids", "completion_mask", "prompt_ids")
        if view == "demonstration":
            assert sum(row["completion_mask"]) == sum(full["completion_mask"])
            assert len(row["input_ids"]) <= 64


def test_an_answer_longer_than_everything_is_dropped_even_when_prompts_may_be_cut(tmp_path, tokenizer):
    found = talks(20)
    found.records[3].completion = [assistant("nine " * 200)]

    cut = tokenise(
        record_set(found.records), tokenizer, TokenPlan("demonstration", 64, "truncate_left"), cache=tmp_path
    )

    assert cut.dropped == {"longer than max_length": 1}


def test_pairs_that_are_the_same_tokens_are_dropped(tmp_path, tokenizer):
    found = talks(300)
    found.records[5].chosen = found.records[5].rejected

    pairs = tokenise(record_set(found.records), tokenizer, TokenPlan("preference", 64), cache=tmp_path)

    assert pairs.dropped == {"chosen and rejected are the same tokens": 1}


def test_old_datasets_leave_the_cache(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("align.data.token_cache.MAX_DATASETS", 2)

    for length in (60, 61, 62):
        tokenise(talks(20), tokenizer, TokenPlan("demonstration", length), cache=tmp_path)

    assert len(list(tmp_path.iterdir())) == 2


def _tokenise_again_and_again(cache: Path, tokenizer, first: int) -> None:
    for number in range(25):
        length = 40 + (first + number) % 4
        found = tokenise(talks(12), tokenizer, TokenPlan("demonstration", length, "drop"), cache=cache)
        assert len(found.rows["input_ids"]) == len(found.rows) > 0


def test_processes_that_prune_one_cache_at_once_lose_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("align.data.token_cache.MAX_DATASETS", 1)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_tokenise_again_and_again, args=(tmp_path, tokenizer, n)) for n in range(4)]

    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_rows_in_use_outlive_their_place_in_the_cache(tmp_path, tokenizer):
    from align.kto import add_mismatched

    plan = TokenPlan("unpaired", 64, "drop")
    tokenise(talks(40), tokenizer, plan, cache=tmp_path)
    found = tokenise(talks(40), tokenizer, plan, cache=tmp_path)
    assert found.reused
    folder = next(tmp_path.iterdir())
    before = sorted(path.name for path in folder.iterdir())

    shutil.rmtree(tmp_path)

    assert len(add_mismatched(found.rows, 4, seed=0)) == len(found.rows)
    assert before == ["facts.json", "rows.arrow"]


@pytest.mark.parametrize("gone", ["rows.arrow", "facts.json"])
def test_what_another_process_has_half_removed_is_written_anew(tmp_path, tokenizer, gone):
    plan = TokenPlan("demonstration", 64)
    whole = tokenise(talks(20), tokenizer, plan, cache=tmp_path)
    (next(tmp_path.iterdir()) / gone).unlink()

    again = tokenise(talks(20), tokenizer, plan, cache=tmp_path)

    assert not again.reused
    assert again.rows[:] == whole.rows[:]
    assert tokenise(talks(20), tokenizer, plan, cache=tmp_path).reused


def test_what_a_killed_process_left_leaves_the_cache_after_a_day(tmp_path, tokenizer):
    for name, age in ((".old", 90_000), (".young", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.arrow").write_bytes(b"a part")
        for path in (tmp_path / name / "rows.arrow", tmp_path / name):
            os.utime(path, (path.stat().st_mtime - age,) * 2)

    tokenise(talks(20), tokenizer, TokenPlan("demonstration", 64), cache=tmp_path)

    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".young"]


def test_a_system_without_affinity_is_asked_for_its_cores(tmp_path, tokenizer, monkeypatch):
    """As macOS is."""
    plan = TokenPlan("demonstration", 64, "drop")
    before = tokenise(talks(50), tokenizer, plan, cache=tmp_path / "linux")
    monkeypatch.setattr("align.data.tokenise.MIN_PARALLEL_RECORDS", 10)
    monkeypatch.delattr(os, "sched_getaffinity")

    for system in ("linux", "darwin"):
        monkeypatch.setattr("sys.platform", system)
        after = tokenise(talks(50), tokenizer, plan, cache=tmp_path / f"{system}-too")
        assert after.rows[:] == before.rows[:]
