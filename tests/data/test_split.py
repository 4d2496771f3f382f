from __future__ import annotations

import json

import pytest

from align.data import load_records
from align.data.__main__ import main
from align.data.record_sets import refuse_leak
from align.data.split import is_held_out
from align.schema import Record, assistant, user


@pytest.fixture
def source(tmp_path):
    """1000 demonstrations over 500 prompts."""
    path = tmp_path / "all.jsonl"
    rows = [{"instruction": f"question {n // 2}", "output": f"answer {n}", "topic": n % 3} for n in range(1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split(source, out, *options):
    return main(["split", str(source), "--out", str(out), "--eval", "0.1", *options])


def prompts(path):
    return {record.prompt[-1]["content"] for record in load_records(str(path)).records}


def test_rows_that_share_a_prompt_stay_together_and_none_is_lost(source, tmp_path, capsys):
    assert split(source, tmp_path / "out") == 0

    train, held_out = (load_records(str(tmp_path / "out" / name)) for name in ("train.jsonl", "eval.jsonl"))
    assert train.rows + held_out.rows == 1000
    assert 60 <= held_out.rows <= 140
    assert not prompts(tmp_path / "out/train.jsonl") & prompts(tmp_path / "out/eval.jsonl")
    refuse_leak(train, held_out)
    assert "data=" in capsys.readouterr().out


def test_both_sides_together_are_what_was_there(source, tmp_path):
    split(source, tmp_path / "out")

    parts = [load_records(str(tmp_path / "out" / name)).records for name in ("train.jsonl", "eval.jsonl")]
    whole = load_records(str(source)).records

    def told(record):
        return record.completion[0]["content"], record.prompt, record.meta

    assert sorted(map(told, parts[0] + parts[1]), key=str) == sorted(map(told, whole), key=str)


def test_adding_rows_moves_no_old_one(source, tmp_path):
    split(source, tmp_path / "before")
    with source.open("a") as file:
        file.writelines(json.dumps({"instruction": f"new {n}", "output": "x"}) + "\n" for n in range(300))
    split(source, tmp_path / "after")

    assert prompts(tmp_path / "before/eval.jsonl") <= prompts(tmp_path / "after/eval.jsonl")
    assert prompts(tmp_path / "before/train.jsonl") <= prompts(tmp_path / "after/train.jsonl")


def test_the_seed_decides(source, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        split(source, tmp_path / name, "--seed", seed)

    one, again, other = ((tmp_path / name / "eval.jsonl").read_bytes() for name in "abc")
    assert one == again
    assert one != other


def test_a_larger_share_keeps_what_was_held_out():
    rows = [Record(prompt=[user(str(n))], completion=[assistant("a")]) for n in range(500)]

    small, large = ({n for n, row in enumerate(rows) if is_held_out(row, share)} for share in (0.05, 0.2))

    assert small < large


def test_by_first_turn_keeps_continuations_together():
    rows = [
        Record(prompt=[user(f"{n}"), assistant("a"), user(f"more {m}")], completion=[assistant("b")])
        for n in range(40)
        for m in range(3)
    ]

    sides = [[is_held_out(row, 0.5, by="first_turn") for row in rows[start : start + 3]] for start in range(0, 120, 3)]

    assert all(len(set(side)) == 1 for side in sides)
    assert any(len({is_held_out(row, 0.5) for row in rows[start : start + 3]}) == 2 for start in range(0, 120, 3))


def test_texts_are_split_by_what_they_say():
    rows = [Record(text=f"text {n}") for n in range(1000)]

    assert 60 <= sum(is_held_out(row, 0.1) for row in rows) <= 140


def test_files_that_are_there_are_not_replaced_without_force(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/eval.jsonl").write_text("mine")

    assert split(source, tmp_path / "out") == 2
    assert "there already" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.jsonl"]
    assert split(source, tmp_path / "out", "--force") == 0
    assert (tmp_path / "out/eval.jsonl").read_text() != "mine"


@pytest.mark.parametrize(
    ("share", "code", "message"),
    [("0", 2, "expected a share between 0 and 1"), ("1", 2, "between 0 and 1"), ("nan", 2, "between 0 and 1")],
)
def test_a_share_that_is_none_is_refused(source, tmp_path, capsys, share, code, message):
    assert main(["split", str(source), "--out", str(tmp_path / "out"), "--eval", share]) == code
    assert message in capsys.readouterr().err


def test_an_empty_side_and_a_bad_row_leave_nothing_behind(tmp_path, capsys):
    few, bad = tmp_path / "few.jsonl", tmp_path / "bad.jsonl"
    few.write_text('{"text": "x"}\n')
    bad.write_text('{"text": "x"}\n{"text": ""}\n')

    assert main(["split", str(few), "--out", str(tmp_path / "out"), "--eval", "0.5"]) == 3
    assert "of 1 rows none falls on the" in capsys.readouterr().err
    assert main(["split", str(bad), "--out", str(tmp_path / "out"), "--eval", "0.5"]) == 3
    assert "bad.jsonl:2 text: is empty" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
