"""Damaged files of every kind: whatever is in them, the only errors are ours."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections import Counter

import pytest

from align.data import load_records
from align.data.formats import FORMATS
from align.errors import AlignError
from align.schema import VIEWS

CASES = 42
"""Damaged copies of each file; with 12 files some 500 in all."""
TALK = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At nine. 九点"}]
TREE = {
    "role": "prompter",
    "text": "When?",
    "replies": [
        {"role": "assistant", "text": "At nine.", "rank": 0, "replies": []},
        {"role": "assistant", "text": "No.", "rank": 1},
    ],
}
SOLVED = {"is_correct": True, "solution": "At nine."}
ROWS = [
    {"messages": TALK, "tools": [{"name": "hours", "parameters": {}}], "weight": 1.0},
    {"conversations": [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "At nine."}], "system": "s"},
    {"prompt": "When?", "chosen": "At nine.", "rejected": "No.", "margin": 1},
    {"instruction": "When?", "input": "", "output": "At nine.", "history": [["a", "b"]]},
    {"question": "2 + 2?", "answer": "4 #### 4"},
    {"input": "When?", "output_1": "At nine.", "output_2": "No.", "label": 1},
    {"message_tree_id": "1", "prompt": TREE},
    {"prompt": "When?", "answers": [{"answer": "At nine.", "rank": 1}, {"answer": "No.", "rank": 2}]},
    {"question": "When?", "6b": SOLVED, "7b": SOLVED | {"is_correct": False, "solution": "No."}},
    {"context": "Open at nine.", "question": "When?", "answers": {"text": ["At nine."], "answer_start": [5]}},
    {"question": "When?", "choices": ["nine", "ten"], "answer": 0},
    {"input": {"messages": TALK[:1]}, "preferred_output": TALK[1:], "non_preferred_output": TALK[1:]},
    {"dialogue": ["When?", "At nine."]},
    {"instruction": "When?", "instances": [{"input": "", "output": "At nine."}]},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"text": "At nine."},
]
VALUES = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    "",
    " ",
    "a",
    [],
    {},
    [[]],
    [None],
    {"a": None},
    "\ud800",
    "\0",
    [1, "a"],
]


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    held = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": TALK}] * 3), held)
    return held.getvalue()


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


LINES = "".join(json.dumps(ROWS[0], ensure_ascii=False) + "\n" for _ in range(3)).encode()
TABLE = b'instruction,output\nq,"a ""b"""\n"q\n2",c\n'
FILES = {
    "a.jsonl": LINES,
    "pairs.jsonl": "".join(json.dumps(ROWS[2]) + "\n" for _ in range(3)).encode(),
    "a.json": json.dumps(ROWS[:1] * 3, indent=1, ensure_ascii=False).encode(),
    "object.json": json.dumps({"version": 1, "data": ROWS[3:4] * 3}).encode(),
    "a.csv": TABLE,
    "a.tsv": TABLE.replace(b",", b"\t"),
    "a.yml": b"categories: [x]\nconversations:\n- - When?\n  - At nine.\n- - 'a: b'\n  - \"c\"\n",
    "a.txt": "one\ntwo 九点\n".encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES),
    "a.parquet": parquet(),
    "gb.yaml": b"",
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A copy with flipped bytes, pieces cut out, doubled or put elsewhere."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 3, 20))
        match rng.randrange(5):
            case 0 if data:
                data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case _:
                data[place:place] = rng.choice(
                    (b'"', b"{", b"]", b"\\", b"\0", b"\xff", b"\n", b",", b":", b"&a *a", b"- ")
                )
    return bytes(data)


def outcome(spec: str, rng: random.Random) -> str:
    try:
        load_records(spec, view=rng.choice((None, None, *VIEWS)), on_bad_row=rng.choice(("error", "skip")))
    except AlignError:
        return "refused"
    return "read"


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_give_only_our_errors(tmp_path, name):
    rng = random.Random(name)
    content = FILES[name]
    if name == "gb.yaml":
        (tmp_path / name).write_text("source: gb.jsonl\nencoding: gb18030\n")
        content = LINES.decode().encode("gb18030")
    outcomes: Counter[str] = Counter()

    for _ in range(CASES):
        (tmp_path / ("gb.jsonl" if name == "gb.yaml" else name)).write_bytes(damaged(content, rng))
        outcomes[outcome(str(tmp_path / name), rng)] += 1

    assert outcomes.total() == CASES
    assert outcomes["refused"]


def swapped(value: object, rng: random.Random) -> object:
    """A copy in which one value somewhere is of another kind, is missing, or stands under another name."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(VALUES)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [*value[:place], swapped(value[place], rng), *value[place + 1 :]]
    key = rng.choice(list(value))
    rest = {name: item for name, item in value.items() if name != key}
    match rng.randrange(6):
        case 0:
            return rest
        case 1:
            return rest | {key + rng.choice("sx_1"): value[key]}
        case _:
            return value | {key: swapped(value[key], rng)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row)[:40])
def test_values_of_the_wrong_kind_give_only_our_errors(tmp_path, row):
    rng = random.Random(str(row))
    outcomes: Counter[str] = Counter()

    for _ in range(CASES // 3):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in (row, swapped(row, rng), swapped(row, rng))))
        outcomes[outcome(str(path), rng)] += 1
        outcomes[outcome(f"{path}:format={rng.choice(list(FORMATS))}", rng)] += 1

    assert outcomes.total() == 2 * (CASES // 3)
    assert outcomes["refused"]


@pytest.mark.parametrize(
    "text", ["[" * 20_000, '{"a":' * 20_000, '{"text": ' + "[" * 900 + "]" * 900 + "}", "1" * 5000]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.yml"])
def test_depth_and_length_give_only_our_errors(tmp_path, name, text):
    (tmp_path / name).write_text(text + "\n")

    with pytest.raises(AlignError):
        load_records(str(tmp_path / name))
