"""Parquet, Arrow and the folders of `save_to_disk`: the rows as written, without nulls that the file added."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.data import load_records
from align.errors import DataError

CALLS = [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [{"x": 1}, {"y": 2}]}}},
    {"type": "function", "function": {"name": "say", "arguments": {"text": "hi"}}},
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "say", "parameters": {"properties": {"text": {"enum": ["hi", None]}}}}},
]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "done"},
        ],
        "tools": TOOLS,
    }
    for number, call in enumerate(CALLS)
]


def write_arrow(path, table, new=pa.ipc.new_stream):
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def contents(records):
    return [(record.prompt, record.completion, record.tools) for record in records]


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow", "feather"])
def test_nulls_of_the_union_of_structs_are_gone_and_items_of_lists_stay(tmp_path, kind):
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        write_arrow(path, table, pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    found = load_records(str(path)).records

    assert contents(found) == contents(load_records(str(tmp_path / "rows.jsonl")).records)
    assert found[0].tools == TOOLS


def test_nulls_that_a_json_file_holds_stay(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"default": None, "enum": [1, None]}}}}
    row = {"messages": ROWS[0]["messages"], "tools": [tool]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")

    assert load_records(str(tmp_path / "a.jsonl")).records[0].tools == [tool]


def test_columns_of_json_and_maps_are_objects(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    table = pa.table(
        {
            "prompt": ["q"],
            "completion": ["a"],
            "tools": pa.ListArray.from_arrays([0, 1], pa.array([json.dumps(tool)]).cast(pa.json_())),
            "meta": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
        }
    )
    write_arrow(tmp_path / "a.arrow", table)

    record = load_records(str(tmp_path / "a.arrow")).records[0]

    assert (record.tools, record.meta) == ([tool], {"k": "v"})


def test_a_json_feature_of_datasets_keeps_its_nulls(tmp_path):
    datasets = pytest.importorskip("datasets")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"default": None}}}}
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "tools": [datasets.Json()]}
    )
    saved = datasets.Dataset.from_list([{"prompt": "q", "completion": "a", "tools": [tool]}], features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "saved.parquet")

    assert load_records(str(tmp_path / "saved")).records[0].tools == [tool]
    assert load_records(str(tmp_path / "saved.parquet")).records[0].tools == [tool]


def make_dataset(count):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(count)])


def asked(spec):
    return [record.prompt[0]["content"] for record in load_records(str(spec)).records]


def test_a_saved_dataset_of_several_shards_is_read_in_order(tmp_path):
    make_dataset(7).save_to_disk(tmp_path / "saved", num_shards=3)

    assert asked(tmp_path / "saved") == [f"q{n}" for n in range(7)]


def test_a_shuffled_saved_dataset_is_read_in_its_order(tmp_path):
    make_dataset(5).select([4, 0, 2]).save_to_disk(tmp_path / "saved")

    assert asked(tmp_path / "saved") == ["q4", "q0", "q2"]


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_indices_beside_saved_data_are_followed(tmp_path, key):
    make_dataset(5).save_to_disk(tmp_path / "saved")
    write_arrow(tmp_path / "saved/indices.arrow", pa.table({"indices": pa.array([3, 1, 1], pa.uint64())}))
    state = json.loads((tmp_path / "saved/state.json").read_text())
    (tmp_path / "saved/state.json").write_text(json.dumps(state | {key: [{"filename": "indices.arrow"}]}))

    assert asked(tmp_path / "saved") == ["q3", "q1", "q1"]


def test_of_a_saved_dict_train_is_read_unless_another_split_is_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=make_dataset(3), test=make_dataset(1)).save_to_disk(tmp_path / "saved")

    assert len(asked(tmp_path / "saved")) == 3
    assert len(asked(f"{tmp_path / 'saved'}:split=test")) == 1
    assert len(asked(f"{tmp_path / 'saved'}:split=all")) == 4
    assert len(asked(tmp_path / "saved/test")) == 1


def lose_a_shard(folder):
    next(folder.glob("*.arrow")).unlink()


def lead_outside(folder):
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../other.arrow"}]}))


def name_a_row_too_many(folder):
    write_arrow(folder / "i.arrow", pa.table({"indices": pa.array([99], pa.uint64())}))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "i.arrow"}]}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_shard, "is missing"),
        (lead_outside, "no data files of this folder"),
        (name_a_row_too_many, "name row 99 of 2"),
        (lambda folder: (folder / "state.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_spoilt_saved_dataset_is_refused(tmp_path, spoil, message):
    make_dataset(2).save_to_disk(tmp_path / "saved")
    spoil(tmp_path / "saved")

    with pytest.raises(DataError, match=message):
        asked(tmp_path / "saved")


def test_descriptions_beside_data_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')

    assert asked(tmp_path) == ["q"]
    shutil.rmtree(tmp_path)
