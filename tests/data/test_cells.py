"""Cells of text that hold a conversation, as JSON or as pandas and numpy write Python lists, are read or refused."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.data import load_records
from align.data.formats.cells import LONGEST_CELL, parse_value, unpack_row
from align.data.row_errors import RowError
from align.errors import DataError

TALK = [{"role": "user", "content": 'say "it\'s"\nnow'}, {"role": "assistant", "content": 'it\'s \\ "fine" 你好'}]


def numpy_text(turns):
    """A list of turns as numpy prints one: without commas between them."""
    return "[" + "\n ".join(map(repr, turns)) + "]"


SPELLED = {
    "json": json.dumps(TALK),
    "unicode json": json.dumps(TALK, ensure_ascii=False, indent=1),
    "python": repr(TALK),
    "numpy": numpy_text(TALK),
    "array": f"array([{', '.join(map(repr, TALK))}], dtype=object)",
}


def write(path, columns, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows]), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".tsv"])
@pytest.mark.parametrize("spelling", SPELLED)
def test_a_conversation_in_a_cell_is_read_without_being_told(tmp_path, suffix, spelling):
    found = load_records(write(tmp_path / f"a{suffix}", ["messages"], [[SPELLED[spelling]]]))

    record = found.records[0]
    assert [*record.prompt, *(record.completion or [])] == TALK
    assert any("hold the text of a list" in note for note in found.notes)


@pytest.mark.parametrize("spell", [json.dumps, repr, numpy_text])
def test_pairs_and_prompts_of_cells_are_turns(tmp_path, spell):
    good, bad = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
    path = write(tmp_path / "a.csv", ["prompt", "chosen", "rejected"], [[spell(TALK[:1]), spell(good), spell(bad)]])

    [record] = load_records(path).records

    assert (record.prompt, record.chosen, record.rejected) == (TALK[:1], good, bad)


def test_a_turn_alone_is_an_answer(tmp_path):
    sides = [repr({"role": "assistant", "content": answer}) for answer in ("good", "bad")]

    [record] = load_records(write(tmp_path / "a.csv", ["prompt", "chosen", "rejected"], [["q", *sides]])).records

    assert record.chosen == [{"role": "assistant", "content": "good"}]


def test_sharegpt_turns_histories_and_choices_in_cells_are_read(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert load_records(write(tmp_path / "a.csv", ["conversations"], [[repr(turns)]])).records[0].prompt[0] == {
        "role": "user",
        "content": "q",
    }
    row = ["which?", "['one' 'two']", "1"]
    [record] = load_records(write(tmp_path / "b.csv", ["question", "choices", "answer"], [row, row])).records[:1]
    assert "(B) two" in record.prompt[0]["content"]
    row = ["next", "then", repr([["q", "a"]])]
    [record] = load_records(write(tmp_path / "c.csv", ["instruction", "output", "history"], [row])).records
    assert len(record.prompt) + len(record.completion or []) == 4


@pytest.mark.parametrize(
    "answer", ['[{"name": "x"}]', "['a', 'b']", "{'a': 1}", "[1, 2]", "[{role: user}]", '{"role": "admin"'][:5]
)
def test_an_answer_that_only_looks_like_data_stays_text(tmp_path, answer):
    [record] = load_records(write(tmp_path / "a.csv", ["prompt", "completion"], [["q", answer]])).records

    assert record.completion == [{"role": "assistant", "content": answer}]


def test_a_document_of_json_stays_a_text(tmp_path):
    assert load_records(write(tmp_path / "a.jsonl", ["text"], [[json.dumps(TALK)]])).records[0].text


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': 'q'} ... {'role': 'assistant', 'content': 'a'}]",
        "[{'role': 'user', 'content': __import__('os').system('true')}]",
        "[{'role': 'user', 'content': " + "[" * 100_000 + "]" * 100_000 + "}]",
        "[{'role': 'user', 'content': '" + "x" * LONGEST_CELL + "'}]",
    ],
)
def test_a_python_list_that_cannot_be_read_is_refused_and_never_trained_as_text(tmp_path, cell):
    with pytest.raises(DataError, match="the text of a Python list that cannot be read"):
        load_records(write(tmp_path / "a.csv", ["prompt", "completion"], [[cell, "a"]]))


@pytest.mark.parametrize(
    "text", ["__import__('os')", "[1 if True else 2]", "[1 + 1]", "[" * 1_000_000, "{1: 2}", "[open('x')]", "-" * 10**6]
)
def test_nothing_is_evaluated(text):
    assert parse_value(text) is None


def test_a_row_without_such_cells_is_the_same_row():
    row = {"prompt": "[note] hello", "completion": "a"}

    assert unpack_row(row) is row
    with pytest.raises(RowError):
        unpack_row({"prompt": "[{'role': 'user', 'content': ?}]"})
