from __future__ import annotations

import errno
import gzip
import json

import pytest

from align.data import load_records
from align.data.__main__ import main
from align.data.convert import SHAPES
from align.schema import Record, assistant, user

CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "tea"}}, "id": "c1"}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    user("Where is tea?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "shelf 3", "tool_call_id": "c1", "name": "find"},
    {"role": "assistant", "content": "On shelf 3.", "train": False},
    user("And 茶?\u2028Really?"),
    assistant("The same."),
]
FILES = {
    "talks": [{"messages": TALK, "tools": [TOOL], "id": "t1", "weight": 0.5}, {"messages": TALK[:1] + TALK[5:]}],
    "pairs": [
        {"prompt": [*TALK[:2], assistant("Here."), user("Where?")], "chosen": "On shelf 3.", "rejected": "No idea."},
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5},
    ],
    "labels": [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "r", "completion": "b", "label": False}],
    "prompts": [{"prompt": "q", "answer": "42"}, {"prompt": "r"}],
    "texts": [{"text": "one\n"}, {"text": "zwei \u00fc"}],
    "kept": [{"instruction": "q", "output": "a", "category": "x", "n": 3, "nested": {"a": [1, None]}}] * 2,
    "reasons": [{"question": "How many?", "answer": "2 + 2\n#### 4"}],
}


@pytest.fixture(params=sorted(FILES))
def source(request, tmp_path):
    path = tmp_path / f"{request.param}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FILES[request.param]))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("shape", ["trl", "messages"])
def test_what_is_converted_reads_back_to_the_same_digest(source, tmp_path, capsys, shape, suffix):
    out = tmp_path / f"out{suffix}"

    assert main(["convert", str(source), "--out", str(out), "--to", shape]) == 0

    before, after = load_records(str(source)), load_records(str(out))
    rows = len(FILES[source.stem])
    assert f"{rows} rows of {rows}, as {shape}" in capsys.readouterr().out
    assert [record.meta for record in after.records] == [record.meta for record in before.records]
    assert after.digest == before.digest


@pytest.mark.parametrize("view", ["demonstration", "unpaired", "prompt"])
def test_a_view_is_written_as_that_view(tmp_path, view):
    source, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(FILES["pairs"][1]) + "\n")

    assert main(["convert", str(source), "--out", str(out), "--view", view]) == 0

    assert load_records(str(out)).digest == load_records(str(source), view=view).digest


def test_earlier_answers_stay_untrained_in_a_conversation(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    prompt = [user("q"), assistant("a"), user("r")]
    source.write_text(json.dumps({"prompt": prompt, "completion": "b"}) + "\n")

    assert main(["convert", str(source), "--out", str(out), "--to", "messages"]) == 0

    [record] = load_records(str(out)).records
    assert [turn.get("train", True) for turn in record.completion if turn["role"] == "assistant"] == [False, True]


def test_sharegpt_keeps_tool_calls_and_labels(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL["function"]}]}
    talk = [user("q"), call, {"role": "tool", "content": "shelf 3"}, assistant("On shelf 3.")]
    source, out = tmp_path / "a.jsonl", tmp_path / "out.parquet"
    source.write_text(json.dumps({"messages": talk, "tools": [TOOL], "label": False}) + "\n")

    assert main(["convert", str(source), "--out", str(out), "--to", "sharegpt"]) == 0

    assert load_records(str(out)).digest == load_records(str(source)).digest


def test_alpaca_keeps_history_system_and_answers(tmp_path):
    turns = [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r"), assistant("b")]
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"messages": turns}) + "\n")

    assert main(["convert", str(source), "--out", str(out), "--to", "alpaca"]) == 0

    row = json.loads(out.read_text())
    assert row == {"instruction": "r", "input": "", "output": "b", "system": "s", "history": [["q", "a"]]}
    assert load_records(str(out)).digest == load_records(str(source)).digest


def test_openai_files_have_text_arguments_ids_and_weights():
    prompt, completion = TALK[:2], TALK[2:]

    row = SHAPES["openai"](Record(prompt=prompt, completion=completion, tools=[TOOL]))
    pair = SHAPES["openai"](Record(prompt=[user("q")], chosen=[assistant("a")], rejected=[assistant("b")]))

    assert row["messages"][2]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "tea"}'}}
    ]
    assert [turn.get("weight") for turn in row["messages"]] == [None, None, None, None, 0, None, None]
    assert pair == {
        "input": {"messages": [user("q")]},
        "preferred_output": [assistant("a")],
        "non_preferred_output": [assistant("b")],
    }


def test_rows_a_shape_cannot_hold_are_left_out_and_counted(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    rows = [*FILES["talks"], {"messages": [user("q"), assistant("")]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert main(["convert", str(source), "--out", str(out), "--to", "alpaca", "--on-bad-row", "skip"]) == 0

    told = capsys.readouterr().out
    assert "1 rows of 3, as alpaca" in told
    assert "1  alpaca has no tools" in told
    assert "1  empty completion" in told


def test_equal_rows_make_equal_compressed_files(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps(FILES["texts"][0]) + "\n")
    outs = [tmp_path / name for name in ("one.jsonl.gz", "two.jsonl.gz")]

    for out in outs:
        assert main(["convert", str(source), "--out", str(out)]) == 0

    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert json.loads(gzip.decompress(outs[0].read_bytes())) == FILES["texts"][0]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--out", "x.csv"], 2, "name it with the ending .jsonl or .jsonl.gz or .parquet"),
        (["--out", "folder"], 2, "folder: a folder; name a file in it"),
        (["--out", "there.jsonl/x.jsonl"], 2, "there.jsonl/x.jsonl: cannot be written"),
        (["--out", "there.jsonl"], 2, "there already; give another name, or --force"),
        (["--out", "x.jsonl", "--to", "mesages"], 2, "--to mesages: unknown; did you mean messages"),
        (["--out", "x.parquet", "--to", "openai"], 2, "openai takes JSON-lines"),
        (["--out", "x.jsonl", "--to", "openai"], 3, "no row can be written as openai (raw text is no conversation: 2)"),
        (["--out", "x.jsonl", "--view", "preference"], 3, "asked for the view preference"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch, capsys, options, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FILES["texts"]))
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "folder").mkdir()

    assert main(["convert", "a.jsonl", *options]) == code

    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "folder", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_a_bad_row_leaves_the_old_file_as_it_was(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "x"}\n{"text": ""}\n')
    out.write_text("old")

    assert main(["convert", str(source), "--out", str(out), "--force"]) == 3
    assert out.read_text() == "old"
    assert main(["convert", str(source), "--out", str(out), "--force", "--on-bad-row", "skip"]) == 0
    assert out.read_text() == '{"text":"x"}\n'


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, suffix):
    source, out = tmp_path / "a.jsonl", tmp_path / f"out{suffix}"
    source.write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(40)))
    written = []

    def full(row):  # a disk that is really full needs root to make
        written.append(row)
        if len(written) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return json.dumps(row).encode() + b"\n"

    monkeypatch.setattr("align.data.writing.dump_row", full)

    assert main(["convert", str(source), "--out", str(out)]) == 6
    assert f"{out}: not written, No space left on device; free space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "name",
    [
        "sft/llamafactory_demo__glaive_toolcall_en_demo.json",
        "pref/llamafactory_demo__dpo_zh_demo.json",
        "unpaired/llamafactory_demo__kto_en_demo.json",
        "text/llamafactory_demo__c4_demo.jsonl",
    ],
)
def test_real_files_survive_the_way_there_and_back(real_data, tmp_path, name):
    out = tmp_path / "out.parquet"

    assert main(["convert", str(real_data / name), "--out", str(out), "--on-bad-row", "skip"]) == 0

    before = load_records(str(real_data / name), on_bad_row="skip")
    assert load_records(str(out)).digest == before.digest
