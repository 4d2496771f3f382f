"""Bad rows and bad files, numbered: the right exit code, one message with place, field, problem and remedy.

The numbers are those of the list of bad inputs that the whole toolkit answers: 1 to 30 are rows, 31 to 40 files, 41 is
the recipe. Those missing here are about tokens (18 to 21) or about a set as a whole (24, 25, 30).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
from dataclasses import dataclass, field

import pytest
from template_zoo import build

from align.data import load_records
from align.data.load import open_scan
from align.data.rendering.render_view import render_view
from align.errors import AlignError, DataError, UsageError
from align.schema import assistant, user

ASK = {"role": "user", "content": "When?"}
ANSWER = {"role": "assistant", "content": "At nine."}
CHAT = {"messages": [ASK, ANSWER]}
PAIR = {"prompt": "When?", "chosen": "At nine.", "rejected": "No."}
ALPACA = {"instruction": "When?", "output": "At nine."}
ANSWERED = {"prompt": "When?", "completion": "At nine."}


@dataclass
class Bad:
    """A row that is refused beside a good one, and what is said about it."""

    good: dict
    bad: object
    message: str
    reason: str
    format: str = "auto"
    view: str | None = None


def chat(*turns):
    return {"messages": list(turns)}


ROWS = {
    "3 missing column": Bad(
        ANSWERED, {"prompt": "q", "completon": "a"}, "completion: no such column", "missing column", "prompt_completion"
    ),
    "5 null field": Bad(ANSWERED, {"prompt": "q", "completion": None}, "completion: is null; fill it in", "null field"),
    "5 null content": Bad(
        CHAT,
        chat(ASK, {"role": "assistant", "content": None}),
        "messages[1]: has 'content' null; add it",
        "message without content",
    ),
    "6 a number": Bad(ALPACA, {"instruction": "q", "output": 7}, "output: is a number, not text", "not text"),
    "6 a boolean": Bad(
        PAIR, PAIR | {"chosen": True}, "chosen: is true or false, neither text nor messages", "not messages"
    ),
    "7 empty prompt": Bad(ANSWERED, {"prompt": "", "completion": "a"}, "prompt: is empty; fill it in", "empty prompt"),
    "7 blank prompt": Bad(CHAT, chat(ASK | {"content": " \n"}, ANSWER), "content: is empty", "empty prompt"),
    "8 empty completion": Bad(ALPACA, {"instruction": "q", "output": " "}, "output: is empty", "empty completion"),
    "8 ideographic space": Bad(ALPACA, {"instruction": "q", "output": "\u3000"}, "is empty", "empty completion"),
    "9 chosen equals rejected": Bad(
        PAIR, PAIR | {"rejected": " At nine.\n"}, "chosen: equals rejected; nothing can be", "chosen equals rejected"
    ),
    "10 both empty": Bad(PAIR, PAIR | {"chosen": "", "rejected": ""}, "chosen: is empty", "empty completion"),
    "11 unknown role": Bad(
        CHAT, chat(ASK, {"role": "asistant", "content": "a"}), "'asistant'; use a known role", "unknown role"
    ),
    "12 no role": Bad(CHAT, chat(ASK, {"content": "a"}), "messages[1]: has no 'role'", "message without role"),
    "12 no content": Bad(
        CHAT, chat(ASK, {"role": "assistant"}), "messages[1]: has no 'content'", "message without content"
    ),
    "13 no messages": Bad(CHAT, chat(), "messages: is an empty list", "no messages"),
    "14 no assistant turn": Bad(CHAT, chat(ASK), "has no assistant turn; add an answer", "no assistant turn"),
    "15 ends with the user": Bad(
        CHAT, chat(ASK, ANSWER, ASK), "ends with a user turn", "last turn is not the assistant's"
    ),
    "15 a prompt that is answered": Bad(
        {"prompt": [ASK]}, {"prompt": [ASK, ANSWER]}, "ends with an assistant turn", "prompt answered", view="prompt"
    ),
    "17 mixed schemas": Bad(CHAT, ALPACA, "messages: no such column (columns: instruction, output)", "missing column"),
    "17 mixed kinds": Bad(
        ANSWERED, {"prompt": "q"}, "completion: no such column", "missing column", "prompt_completion"
    ),
    "17 not an object": Bad(ALPACA, [1, 2], "row: is a list, not an object", "not a row"),
    "27 NUL": Bad(CHAT, chat(ASK, ANSWER | {"content": "a\0"}), "content: holds U+0000, which is no text", "not text"),
    "27 lone surrogate": Bad(ALPACA, {"instruction": "q", "output": "a\ud800"}, "output: holds U+D800", "not text"),
    "28 NaN": Bad(ALPACA, ALPACA | {"score": float("nan")}, "score: is nan; write a finite", "not a finite number"),
    "28 infinite": Bad(PAIR, PAIR | {"margin": float("inf")}, "margin: is inf", "not a finite number"),
    "29 no common prefix": Bad(
        {"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER | {"content": "No."}]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK | {"content": "Where?"}, ANSWER]},
        "chosen: chosen and rejected differ in a user turn (turn 1); a pair must answer the same prompt",
        "prompts differ",
    ),
    "29 no prompt at all": Bad(
        {"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER | {"content": "No."}]},
        {"chosen": "a", "rejected": "b"},
        "prompt: has no user turn",
        "empty prompt",
    ),
    "34 truncated line": Bad(
        ALPACA, '{"instruction": "q", "output": "a', "where it is cut off; fetch the file again", "invalid JSON"
    ),
    "36 duplicate key": Bad(
        ALPACA, '{"instruction": "q", "output": "a", "output": "b"}', "output: written twice", "key written twice"
    ),
    "36 duplicate key inside": Bad(
        CHAT, json.dumps(CHAT).replace('{"role"', '{"role": "user", "role"'), "role: written twice", "key written twice"
    ),
    "36 duplicate key, one before a space": Bad(
        ALPACA, '{"instruction": "q", "output" : "a", "output": "b: c"}', "output: written twice", "key written twice"
    ),
    "36 duplicate key beside text like one": Bad(
        ALPACA, '{"instruction": "\\":", "output" : ": a", "output": "b"}', "output: written twice", "key written twice"
    ),
}


def line_of(row: object) -> str:
    return row if isinstance(row, str) else json.dumps(row)


@pytest.mark.parametrize("case", ROWS)
def test_bad_row(tmp_path, case):
    bad = ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([line_of(bad.good), line_of(bad.bad), line_of(bad.good)]) + "\n", encoding="utf-8")
    spec = f"{path}:format={bad.format}" if bad.format != "auto" else str(path)

    with pytest.raises(DataError) as refused:
        load_records(spec, view=bad.view)
    skipped = load_records(spec, view=bad.view, on_bad_row="skip")

    headline, told, totals = str(refused.value).split("\n")
    assert headline.startswith("rows.jsonl")
    assert "1 of 3 rows cannot be used" in headline
    assert re.fullmatch(r"  \S*rows\.jsonl:2 \S+: .+; .+", told)
    assert bad.message in told
    assert totals == f"  total {bad.reason}: 1"
    assert refused.value.exit_code == 3
    assert (skipped.rows, skipped.dropped) == (2, {bad.reason: 1})


def test_equal_errors_are_shown_once_and_all_are_counted(tmp_path):
    kinds = [{"instruction": "q", "output": ""}, {"instruction": "q", "output": 5}, {"instruction": "q"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [ALPACA] * 30 + kinds * 25))

    with pytest.raises(DataError) as refused:
        load_records(str(path))

    text = str(refused.value)
    assert "75 of 105 rows cannot be used" in text
    assert [text.count(part) for part in ("output: is empty", "output: is a number", "output: no such column")] == [
        1,
        1,
        1,
    ]
    assert text.count("(and 24 more rows like it)") == 3
    assert "empty completion: 25" in text


def test_long_values_are_shortened(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat(ASK, {"role": "x" * 5000, "content": "a"})) + "\n")

    with pytest.raises(DataError) as refused:
        load_records(f"{tmp_path}/rows.jsonl:format=messages")

    assert len(str(refused.value)) < 1000


@dataclass
class File:
    """A file that is refused as a whole."""

    name: str
    content: bytes
    message: str
    recipe: str = ""
    error: type[AlignError] = DataError
    view: str | None = None


LINES = "".join(json.dumps(ALPACA | {"instruction": f"q{n}"}) + "\n" for n in range(3)).encode()
GB = '{"instruction": "q", "output": "九点"}\n'.encode("gb18030")
FILES = {
    "1 empty": File("a.jsonl", b"", "a.jsonl: 0 rows; the file is empty; give data"),
    "1 blank lines": File("a.jsonl", b"\n \r\n\n", "0 rows"),
    "1 an empty list": File("a.json", b" [ ]\n", "0 rows"),
    "1 a header alone": File("a.csv", b"instruction,output\n", "0 rows"),
    "2 nothing left": File(
        "a.jsonl",
        json.dumps(PAIR | {"rejected": "At nine."}).encode(),
        "1 of 1 rows cannot be used",
    ),
    "2 nothing left after filters": File(
        "a.jsonl",
        json.dumps(ANSWERED | {"label": False}).encode(),
        "0 of 1 rows can be used (labelled bad: 1); correct the data",
        view="demonstration",
    ),
    "3 no column is known": File(
        "a.jsonl",
        b'{"remark": "q", "topic": "a"}\n',
        "cannot be recognised from the columns remark, topic; write",
    ),
    "4 a slip hides a column": File(
        "a.jsonl",
        json.dumps({"prompt": "q", "chosen": "a", "rejectd": "b"}).encode(),
        "the column 'rejectd' is nearly called 'rejected', which would decide the format; rename it",
    ),
    "4 a slip hides the only column": File(
        "a.jsonl", json.dumps({"mesages": [ASK, ANSWER]}).encode(), "did you mean messages by mesages?"
    ),
    "31 GB18030": File(
        "a.jsonl",
        LINES + GB,
        "a.jsonl:4:33: not UTF-8 (byte 0xbe); name its encoding, such as data=a.jsonl:e",
        recipe="",
    ),
    "31 GB18030 in a table": File(
        "a.csv", "instruction,output\nq,九点\n".encode("gb18030"), "a.csv:2:3: not UTF-8 (byte 0xbe)"
    ),
    "31 GB18030 in a list": File("a.json", b'[\n{"instruction": "\xbe\xc5"}]', "a.json:2:18: not UTF-8 (byte 0xbe)"),
    "31 latin-1 in a text": File("a.txt", b"one\ncaf\xe9", "a.txt:2:4: not UTF-8 (byte 0xe9)"),
    "31 not even what was said": File(
        "a.jsonl", LINES + b'{"x": "\xff\xff"}', "a.jsonl:4:8: not gb18030 (byte 0xff)", "encoding: gb18030\n"
    ),
    "31 UTF-16": File(
        "a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16, not UTF-8; give data=a.jsonl:encoding=utf-16"
    ),
    "31 no encoding": File(
        "a.jsonl", LINES, "encoding: 'utf-9' is not known; write one", "encoding: utf-9\n", UsageError
    ),
    "34 a truncated list": File("a.json", json.dumps([ALPACA] * 3, indent=1).encode()[:-30], "a.json:1"),
    "34 a truncated gzip": File("a.jsonl.gz", gzip.compress(LINES)[:-12], "gzip data is damaged or cut off; fetch"),
    "34 truncated zstd": File("a.jsonl.zst", b"", "zstd data is damaged or cut off"),
    "36 a key twice around the rows": File("a.json", b'{"data": [], "data": []}', "a.json data: written twice; keep"),
    "38 a zip of many": File("a.zip.jsonl", b"", "a zip file of 2 files; unpack it"),
    "39 of no kind": File("a.docx", b"PK", "files of this kind are not read; convert it to one of .json"),
    "41 an unknown key": File(
        "a.jsonl", LINES, "formt: unknown setting; did you mean format", "formt: qa\n", UsageError
    ),
    "41 an unknown part": File(
        "a.jsonl",
        LINES,
        "no part 'promt' in format qa; did you mean prompt",
        "format: qa\ncolumns: {promt: x}\n",
        UsageError,
    ),
    "41 a control character": File("a.jsonl", LINES, "not valid YAML", "format: qa\x0e\n", UsageError),
    "41 without end": File("a.jsonl", LINES, "not valid YAML", "tags: " + "[" * 2000, UsageError),
    "41 a key twice": File("a.jsonl", LINES, "format: written twice", "format: qa\nformat: alpaca\n", UsageError),
}


def content_of(case: str) -> bytes:
    if "zstd" in case:
        return zstd(LINES * 50)[:-9]
    if "zip of many" in case:
        return zip_of(**{"a.jsonl": LINES, "b.jsonl": LINES})
    return FILES[case].content


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


def zip_of(**files: bytes) -> bytes:
    import io
    import zipfile

    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return held.getvalue()


def place(tmp_path, name: str, content: bytes, recipe: str = "") -> str:
    (tmp_path / name).write_bytes(content)
    if not recipe:
        return str(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(f"source: {name}\n{recipe}")
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("case", FILES)
def test_bad_file(tmp_path, case):
    file = FILES[case]
    spec = place(tmp_path, file.name, content_of(case), file.recipe)

    with pytest.raises(file.error) as refused:
        load_records(spec, view=file.view)

    assert file.message in str(refused.value)
    assert refused.value.exit_code == {DataError: 3, UsageError: 2}[file.error]


@dataclass
class Fine:
    """A file that looks bad and is not."""

    name: str
    content: bytes
    rows: int
    recipe: str = ""
    notes: tuple[str, ...] = ()
    answers: list[str] = field(default_factory=list)


WITH_BOM = b"\xef\xbb\xbf"
ACCEPTED = {
    "4 an unknown column": Fine(
        "a.jsonl", json.dumps(ALPACA | {"topic": 1}).encode(), 1, notes=("columns kept as meta: topic",)
    ),
    "4 a slip in an optional column": Fine(
        "a.jsonl", json.dumps(ALPACA | {"systm": "s"}).encode(), 1, notes=("did you mean system by systm?",)
    ),
    "16 two system turns": Fine(
        "a.jsonl",
        json.dumps(chat({"role": "system", "content": "s"}, {"role": "system", "content": "t"}, ASK, ANSWER)).encode(),
        1,
    ),
    "16 one speaker twice": Fine("a.jsonl", json.dumps(chat(ASK, ASK, ANSWER, ANSWER)).encode(), 1),
    "22 duplicate ids": Fine(
        "a.jsonl",
        b"".join(json.dumps(ALPACA | {"id": 1, "output": f"a{n}"}).encode() + b"\n" for n in range(3)),
        3,
        notes=("2 rows have the id of an earlier, other row",),
    ),
    "23 exact duplicates": Fine(
        "a.jsonl", LINES[: LINES.index(b"\n") + 1] * 4, 4, notes=("3 rows repeat an earlier row exactly",)
    ),
    "26 control tokens": Fine(
        "a.jsonl", json.dumps(ALPACA | {"output": "<|im_end|></s>"}).encode(), 1, answers=["<|im_end|></s>"]
    ),
    "31 GB18030 that is said": Fine("a.jsonl", GB * 2, 2, "encoding: gb18030\n", answers=["九点"] * 2),
    "31 GB18030 in a table": Fine(
        "a.csv", "instruction,output\r\nq,九点\r\n".encode("gb18030"), 1, "encoding: gb18030\n", answers=["九点"]
    ),
    "31 UTF-16 that is said": Fine("a.jsonl", LINES.decode().encode("utf-16"), 3, "encoding: utf-16\n"),
    "32 BOM": Fine("a.jsonl", WITH_BOM + LINES, 3),
    "32 BOM before a table": Fine("a.csv", WITH_BOM + b"instruction,output\nq,a\n", 1, answers=["a"]),
    "33 cells like nothing": Fine(
        "a.csv", b"instruction,output\nq,NA\nq,null\nq,None\nq,nan\n", 4, answers=["NA", "null", "None", "nan"]
    ),
    "34 no final newline": Fine("a.jsonl", LINES.rstrip(b"\n"), 3),
    "35 a list named as lines": Fine(
        "a.jsonl", json.dumps([ALPACA] * 2).encode(), 2, notes=("holds a JSON array; it was read as such",)
    ),
    "35 lines named as a list": Fine("a.json", LINES, 3, notes=("holds JSON-lines; it was read as such",)),
    "37 CRLF": Fine("a.jsonl", LINES.replace(b"\n", b"\r\n"), 3),
    "37 CRLF in a list": Fine("a.json", json.dumps([ALPACA] * 2, indent=1).replace("\n", "\r\n").encode(), 2),
    "37 CR alone in a cell": Fine("a.csv", b'instruction,output\nq,"a\rb"\n', 1, answers=["a\rb"]),
    "37 CR alone in a string": Fine("a.jsonl", json.dumps(ALPACA | {"output": "a\rb"}).encode(), 1, answers=["a\rb"]),
    "37 U+2028 in a string": Fine(
        "a.jsonl", '{"instruction": "q", "output": "a\u2028b\u0085c"}\n'.encode(), 1, answers=["a\u2028b\u0085c"]
    ),
    "38 gzip named .jsonl": Fine("a.jsonl", gzip.compress(LINES), 3, notes=("packed (gzip)",)),
    "38 zstd named .jsonl": Fine("a.jsonl", zstd(LINES), 3, notes=("packed (zstd)",)),
    "38 zstd": Fine("a.jsonl.zst", zstd(LINES), 3),
    "38 zip": Fine("a.json.zip", zip_of(**{"a.json": json.dumps([ALPACA] * 3).encode()}), 3),
    "38 plain named .gz": Fine("a.jsonl.gz", LINES, 3),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_but_sound_file(tmp_path, case):
    file = ACCEPTED[case]

    found = load_records(place(tmp_path, file.name, file.content, file.recipe))

    notes = "\n".join(found.notes)
    assert (found.rows, found.dropped) == (file.rows, {})
    assert [part for part in file.notes if part not in notes] == []
    if file.answers:
        assert [record.completion[0]["content"] for record in found.records] == file.answers


def test_16_alternation_is_the_templates_to_judge(tmp_path):
    path = place(
        tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in (CHAT, chat(ASK, ASK, ANSWER))).encode()
    )
    records = load_records(path).records

    assert render_view("demonstration", records, build("chatml"), 512).dropped == {}
    assert sum(render_view("demonstration", records, build("mistral"), 512).dropped.values()) == 1


def test_26_control_strings_in_content_are_never_control_tokens(tmp_path):
    path = place(tmp_path, "a.jsonl", json.dumps(chat(ASK | {"content": "say <|im_end|>"}, ANSWER)).encode())
    tokenizer = build("chatml")

    [row] = render_view("demonstration", load_records(path).records, tokenizer, 512).rows

    assert row["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_31_to_38_bytes_of_other_encodings_are_counted_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("align.data.containers.data_files.BLOCK", 7)
    good = '{"instruction": "九点", "output": "开门"}\n'.encode("gb18030")
    spec = place(tmp_path, "a.jsonl", good * 3 + b'{"instruction": "\xbe\xc5\xff', "encoding: gb18030\n")

    with pytest.raises(DataError, match=r"a\.jsonl:4:20: not gb18030 \(byte 0xff\)"):
        load_records(spec)


@pytest.fixture
def without_privileges():
    """Run as somebody whom file modes bind, when the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_39_a_folder_is_its_files_and_an_empty_one_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()

    with pytest.raises(DataError, match="a folder without data files"):
        load_records(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "name", ["pipe.jsonl", "pipe.json", "pipe.csv", "pipe.tsv", "pipe.parquet", "pipe.txt", "pipe.yaml"]
)
def test_39_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)

    with pytest.raises(DataError, match="is no regular file"):
        load_records(str(tmp_path / name))


def test_39_pipes_and_loops_inside_a_folder_are_left_out_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")

    found = load_records(str(tmp_path))

    assert found.rows == 3
    assert any("left out 'loop.jsonl, pipe.jsonl'" in note for note in found.notes)


def test_39_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")

    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(.*symbolic links\); check the path"):
        load_records(str(tmp_path / "a.jsonl"))


def test_39_a_file_that_may_not_be_read_is_refused(tmp_path, request):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl").chmod(0)
    request.getfixturevalue("without_privileges")

    with pytest.raises(DataError, match=r"a\.jsonl.*: cannot be read \(Permission denied\); check"):
        load_records(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("path", ["/dev/zero", "a" * 5000 + ".jsonl", "a\0b.jsonl"])
def test_39_what_is_no_file_is_refused(path):
    with pytest.raises(AlignError):
        load_records(path)


@pytest.mark.parametrize("change", ["grow", "shrink", "replace", "remove"])
def test_40_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES * 10_000)
    batches = iter(open_scan(str(path)))
    next(batches)

    if change == "grow":
        with path.open("ab") as file:
            file.write(LINES)
    elif change == "shrink":
        os.truncate(path, path.stat().st_size - len(LINES))
    else:
        path.unlink()
        if change == "replace":
            path.write_bytes(LINES * 10_000)

    with pytest.raises(DataError, match=r"a\.jsonl: (changed while it was read|cannot be read)"):
        for _ in batches:
            pass


def test_40_reading_a_part_of_a_growing_file_is_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES * 10_000)

    with contextlib.closing(iter(open_scan(f"{path}:limit=5"))) as batches:
        [batch] = list(batches)

    assert [record.prompt for record in batch[:1]] == [[user("q0")]]
    assert batch[0].completion == [assistant("At nine.")]
