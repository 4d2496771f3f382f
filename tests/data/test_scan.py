from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from align.data.load import BATCH, load_records, open_scan
from align.data.record_sets import Findings, digest_records
from align.errors import DataError
from align.schema import Record


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def alpaca(count: int) -> list[dict]:
    return [{"instruction": f"q{n}", "output": "a"} for n in range(count)]


def test_batches_are_bounded_and_complete_in_order(tmp_path):
    found = open_scan(write(tmp_path / "a.jsonl", alpaca(2 * BATCH + 5)))

    sizes, asked = [], []
    for batch in found:
        sizes.append(len(batch))
        asked += [record.prompt[0]["content"] for record in batch]

    assert sizes == [BATCH, BATCH, 5]
    assert asked == [f"q{n}" for n in range(2 * BATCH + 5)]
    assert (found.rows, found.kept) == (2 * BATCH + 5, 2 * BATCH + 5)


def test_a_view_that_doubles_rows_keeps_to_the_bound(tmp_path):
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(BATCH)]
    found = open_scan(write(tmp_path / "a.jsonl", pairs), view="unpaired")

    assert [len(batch) for batch in found] == [BATCH, BATCH]
    assert (found.rows, found.kept) == (BATCH, 2 * BATCH)


def test_the_account_equals_that_of_loading(tmp_path):
    rows = [*alpaca(5), *alpaca(3), {"instruction": "q", "output": ""}, {"instruction": "w", "output": "x", "topic": 1}]
    path = write(tmp_path / "a.jsonl", rows)

    found = open_scan(path, on_bad_row="skip")
    records = [record for batch in found for record in batch]

    findings = Findings()
    for record in records:
        findings.add(record)
    assert found.digest == load_records(path, on_bad_row="skip").digest == digest_records(records)
    assert findings.counts["repeated"] == 3
    assert found.drop_counts() == {"empty completion": 1}
    assert [row.where for row in found.bad.shown] == [f"{path}:9"]
    assert any("columns kept as meta: topic" in note for note in found.notes)


def test_bad_rows_are_an_error_only_when_all_were_seen(tmp_path):
    found = open_scan(write(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}, *alpaca(BATCH + 1)]))
    batches = iter(found)

    assert len(next(batches)) == BATCH
    assert len(next(batches)) == 1
    with pytest.raises(DataError, match="1 of 1002 rows cannot be used"):
        next(batches)


def test_many_bad_rows_are_counted_but_not_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", [*alpaca(1), *[{"instruction": "q", "output": ""}] * 500])
    other = [{"prompt": "q", "completion": "a", "label": f"l{number}"} for number in range(500)]
    several = write(tmp_path / "b.jsonl", other)
    told = []

    found = open_scan(path, on_bad_row="collect", on_bad=told.append)
    for _ in found:
        pass

    different = open_scan(several, on_bad_row="collect")
    assert not list(different)
    assert (len(found.bad.shown), found.bad.reasons["empty completion"], len(told)) == (1, 500, 500)
    assert (len(different.bad.shown), different.bad.reasons["bad label"]) == (20, 500)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_nothing_left_is_an_error_that_shows_the_first_bad_row(tmp_path, on_bad_row):
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "output": ""}])

    with pytest.raises(DataError, match=r"a\.jsonl:1 output: is empty"):
        list(open_scan(path, on_bad_row=on_bad_row))

    assert list(open_scan(path, on_bad_row="collect")) == []


def test_a_sample_is_fair_and_of_the_whole_file(tmp_path):
    path = write(tmp_path / "a.jsonl", alpaca(1000))

    drawn = [
        int(record.prompt[0]["content"][1:]) for batch in open_scan(f"{path}:limit=200:seed=3") for record in batch
    ]

    assert len(set(drawn)) == 200
    assert drawn != sorted(drawn)
    assert 400 < sum(drawn) / 200 < 600  # the mean of 0..999 is 499.5; a fair sample of 200 strays by 18 or so


def test_a_row_of_several_examples_loses_only_the_bad_ones(tmp_path):
    instances = [{"input": "", "output": "a"}, {"input": "", "output": ""}, {"input": "x", "output": "b"}]
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "instances": instances}])

    found = open_scan(path, on_bad_row="skip")
    [records] = list(found)

    assert [record.completion[0]["content"] for record in records] == ["a", "b"]
    assert (found.rows, found.drop_counts()) == (1, {"empty completion": 1})


def test_the_digest_tells_content_from_other_columns():
    base = Record(prompt=[{"role": "user", "content": "q"}], completion=[{"role": "assistant", "content": "a"}])
    other = Record(prompt=base.prompt, completion=base.completion, id="7", meta={"topic": 1})

    findings = Findings()
    for record in (base, other):
        findings.add(record)

    assert findings.counts["repeated"] == 1
    assert digest_records([base]) != digest_records([other])
    assert digest_records([base]) != digest_records([base, base])


def test_the_digest_takes_numbers_that_fast_json_does_not_and_refuses_depths():
    deep: list = []
    for _ in range(300):
        deep = [deep]

    assert digest_records([Record(text="t", meta={"x": 2**70})]).startswith("sha256:")
    with pytest.raises(DataError, match=r"a\.jsonl:7 row: is nested too deeply"):
        digest_records([Record(text="t", meta={"x": deep}, source="a.jsonl", line=7)])


VALUES = [
    {"text": "plain"},
    {"text": 'quotes " and \\ and \u2028 and 九点 \U0001f600'},
    {"text": "x" * 50, "n": [1, 2.5, -3e-2, None, True, {"a": {"b": []}}]},
    "bare",
    {"text": "last", "meta": {"k": ""}},
]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 13, 64])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_the_same_whatever_the_blocks(tmp_path, monkeypatch, block, ascii_only, indent):
    monkeypatch.setattr("align.data.containers.data_files.BLOCK", block)
    (tmp_path / "a.json").write_text(json.dumps(VALUES, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    around = json.dumps({"version": "1.0", "data": VALUES, "n": 12.5}, ensure_ascii=ascii_only, indent=indent)
    (tmp_path / "b.json").write_text(around, encoding="utf-8")

    expected = [value if isinstance(value, str) else value["text"] for value in VALUES]
    for name in ("a.json", "b.json"):
        assert [record.text for record in load_records(str(tmp_path / name)).records] == expected


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_lines_are_read_the_same_whatever_the_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr("align.data.containers.data_files.BLOCK", block)
    texts = ["plain", "九点 \U0001f600", "", "x" * 30]
    rows = [{"text": f"{n} {text}"} for n, text in enumerate(texts)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.csv").write_text("text\n" + "".join(f'"{row["text"]}\n"\n' for row in rows), encoding="utf-8")
    (tmp_path / "c.txt").write_text("".join(row["text"] + "\n" for row in rows), encoding="utf-8")

    assert [record.text for record in load_records(f"{tmp_path}/a.jsonl").records] == [row["text"] for row in rows]
    assert [record.text for record in load_records(f"{tmp_path}/b.csv").records] == [row["text"] + "\n" for row in rows]
    assert [record.text for record in load_records(f"{tmp_path}/c.txt").records] == [
        "\n".join(map(str, [r["text"] for r in rows])) + "\n"
    ]


def test_a_long_text_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("align.data.containers.text_files.LONGEST_TEXT", 10)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour, which is longer\nfive")

    found = load_records(str(tmp_path / "a.txt"))

    assert [record.text for record in found.records] == ["one\ntwo\n", "three\n", "four, which is longer\n", "five"]
    assert [record.line for record in found.records] == [1, 3, 4, 5]
    assert any("cut at line ends" in note for note in found.notes)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("align.data.containers.data_files.LONGEST_LINE", 1000)
    monkeypatch.setattr("align.data.containers.data_files.BLOCK", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "x" * 5000)

    with pytest.raises(DataError, match=r"a\.jsonl:2: a line of more than"):
        load_records(str(tmp_path / "a.jsonl"))


MEASURE = """
import re, sys
from pathlib import Path
from align.data.load import open_scan
kept = 0
for path in sys.argv[1:]:
    found = open_scan(path)
    for batch in found:
        kept += len(batch)
# Not getrusage: its peak goes on from the process that started this one.
print(kept, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_stays_far_below_the_size_of_the_files(tmp_path):
    rng = random.Random(0)
    sayings = ["".join(rng.choices("abcdefgh ", k=16_000)) for _ in range(50)]
    rows = [json.dumps({"instruction": f"q{n}", "output": saying}) for n, saying in enumerate(sayings)]
    with (tmp_path / "a.jsonl").open("w") as file:  # 120 MB
        for _ in range(150):
            file.write("\n".join(rows) + "\n")
    with (tmp_path / "b.json").open("w") as file:  # 32 MB
        file.write("[" + ",\n".join(rows * 40) + "]")
    with (tmp_path / "c.csv").open("w") as file:  # 32 MB
        file.write("instruction,output\n" + "".join(f"q,{saying}\n" for saying in sayings * 40))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", compresslevel=1) as file:
        file.write("\n".join(rows * 10) + "\n")

    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.csv", "d.jsonl.gz")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)

    kept, peak = map(int, done.stdout.split())
    assert (tmp_path / "a.jsonl").stat().st_size > 115e6
    assert kept == 50 * (150 + 40 + 40 + 10)
    assert peak < 80
