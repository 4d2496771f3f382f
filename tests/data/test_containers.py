from __future__ import annotations

import gzip
import json

import pytest

from align.data import load_records
from align.errors import DataError

ROWS = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def questions(path) -> list[str]:
    return [record.prompt[0]["content"] for record in load_records(str(path)).records]


def lines_of(path) -> list[int | None]:
    return [record.line for record in load_records(str(path)).records]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", LINES.rstrip("\n").encode()),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", LINES.encode()),
        ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("a.json", json.dumps({"canary": "x", "examples": ROWS}, indent=1).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.ndjson", LINES.encode()),
        ("a.csv", b"instruction,output\nq0,a0\nq1,a1\nq2,a2"),
        ("a.csv", b"\xef\xbb\xbfinstruction,output\r\nq0,a0\r\nq1,a1\r\nq2,a2\r\n"),
        ("a.csv", b'instruction,output\nq0,"a, ""0"""\nq1,"a\n1"\nq2,a2\n'),
        ("a.tsv", b"instruction\toutput\nq0\ta0\nq1\ta1\nq2\ta2\n"),
    ],
)
def test_containers_hold_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    assert questions(tmp_path / name) == ["q0", "q1", "q2"]


def test_parquet_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    talk = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0", "tool_calls": None}]
    table = pyarrow.Table.from_pylist([{"messages": talk}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but cut off")

    assert questions(tmp_path / "a.parquet") == ["q0"]
    with pytest.raises(DataError, match="no readable Parquet"):
        load_records(str(tmp_path / "b.parquet"))


def test_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.csv").write_text('instruction,output\nq,"a\nb"\nq,a\n')

    assert lines_of(tmp_path / "a.json") == [2, 6, 10]
    assert lines_of(tmp_path / "b.json") == [1, 2, 3]
    assert lines_of(tmp_path / "c.csv") == [2, 4]
    assert any("numbered in place of lines" in note for note in load_records(str(tmp_path / "b.json")).notes)


def test_unicode_line_separators_end_no_line(tmp_path):
    row = {"instruction": "q\u2028\u2029\x85\x0c", "output": "a"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")

    assert questions(tmp_path / "a.jsonl") == [row["instruction"]]


def test_cells_that_look_like_nothing_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,input\nNA,null,\nq,NaN,None\n")

    records = load_records(str(tmp_path / "a.csv")).records

    assert [record.completion[0]["content"] for record in records] == ["null", "NaN"]
    assert [record.prompt[0]["content"] for record in records] == ["NA", "q\nNone"]


def test_a_stray_quote_in_a_tsv_swallows_no_rows(tmp_path):
    (tmp_path / "a.tsv").write_text('instruction\toutput\n"q0\ta0\nq1\ta1\nq2 "x\ta2\n')
    (tmp_path / "b.tsv").write_text('instruction\toutput\n"q\n0"\ta0\n"q\n1"\ta1\n')

    assert questions(tmp_path / "a.tsv") == ['"q0', "q1", 'q2 "x']
    assert questions(tmp_path / "b.tsv") == ["q\n0", "q\n1"]


def test_rows_of_the_wrong_width_are_bad_rows(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\nq,a\nq,a,x\nq\n")

    assert load_records(str(tmp_path / "a.csv"), on_bad_row="skip").dropped == {"wrong number of cells": 2}


def test_a_text_file_is_one_document_and_a_folder_many(tmp_path):
    (tmp_path / "books" / "more").mkdir(parents=True)
    (tmp_path / "books" / "a.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "books" / "more" / "b.txt").write_text("three")
    (tmp_path / "books" / "readme.md").write_text("not data")
    (tmp_path / "books" / ".hidden.txt").write_text("not data")

    found = load_records(str(tmp_path / "books"), view="text")

    assert [record.text for record in found.records] == ["one\ntwo", "three"]
    assert found.records[1].source.endswith("books/more/b.txt")


def test_bare_strings_are_texts(tmp_path):
    (tmp_path / "a.json").write_text('["one", "two"]')

    assert [record.text for record in load_records(str(tmp_path / "a.json")).records] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES.encode() + b'{"x": "\xb0\xa1"}', r"a\.jsonl:4:8: not UTF-8 \(byte 0xb0\); .*iconv"),
        ("a.csv", b"\xef\xbb\xbfx,y\n1,\xff", r"a\.csv:2:3: not UTF-8 \(byte 0xff\)"),
        ("a.csv", b"\xef\xbb\xbfx\xff,y\n", r"a\.csv:1:5: not UTF-8"),
        ("a.json", b'[{"a": 1},\n {"a": ', r"a\.json:2 not valid JSON: .*correct the file"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', r"a\.json:2 not valid JSON: no , or \]"),
        ("a.json", b'[\n{"a": 1},\n{"a": 2}', r"a\.json:3 not valid JSON"),
        ("a.json", b'{"a": 1,\n "b": 2}', "holds one object"),
        ("a.json", b'{"a": 1,\n "b"', r"a\.json:2 not valid JSON"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "gzip data is damaged"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "zstd data is damaged"),
        ("a.docx", b"PK", "files of this kind are not read"),
    ],
)
def test_unreadable_files_say_where_and_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message):
        load_records(str(tmp_path / name))


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "empty").mkdir()

    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl"):
        load_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="a folder without data files"):
        load_records(str(tmp_path / "empty"))


def test_a_hub_dataset_that_cannot_be_reached_is_a_data_error():
    with pytest.raises(DataError, match="hf://nobody/nothing: the dataset cannot be read"):
        load_records("hf://nobody/nothing")


@pytest.mark.parametrize(
    ("name", "layout", "line"),
    [
        ("a.jsonl", "{good}\n{bad}\n{good}\n", 2),
        ("a.json", "[\n{good},\n{bad},\n{good}\n]", 3),
        ("a.json", '{{"version": 1,\n"data": [{good},\n{bad},\n{good}]}}', 2),
    ],
)
@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ('{"instruction": "q", "output": "a", "output": "b"}', "output"),
        ('{"instruction": "q", "output": "a", "x": [{"y": {"z": 1, "z": 1}}]}', "z"),
        ('{"instruction": "q", "output": "a", "output": {"u": 1, "u": 2}}', "output"),
    ],
)
def test_a_key_written_twice_makes_a_bad_row(tmp_path, name, layout, line, bad, key):
    (tmp_path / name).write_text(layout.format(good='{"instruction": "q0", "output": "a"}', bad=bad))

    with pytest.raises(DataError) as refused:
        load_records(str(tmp_path / name))

    assert f"{name}: 1 of 3 rows cannot be used" in str(refused.value)
    assert f"{name}:{line} {key}: written twice; keep one" in str(refused.value)
    assert load_records(str(tmp_path / name), on_bad_row="skip").dropped == {"key written twice": 1}


def test_a_torn_line_with_a_key_twice_spoils_no_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": {"a": 1, "a": 1}, "y\n' + LINES)

    assert load_records(str(tmp_path / "a.jsonl"), on_bad_row="skip").dropped == {"invalid JSON": 1}


def test_rows_listed_twice_in_one_object_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}, indent=1)[:-1] + ', "data": []}')

    with pytest.raises(DataError, match=r"a\.json data: written twice; keep one"):
        load_records(str(tmp_path / "a.json"))
