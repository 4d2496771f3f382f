"""Folders of several splits: only what is asked for is read, `train` unless something else is, and that is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.data import load_records
from align.data.containers.folders import kind_of_split, split_of
from align.errors import AlignError, DataError


def put(folder: Path, *names: str) -> Path:
    """One row a file, whose text is the name of the file."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


def read(folder: Path, options: str = "") -> list[str]:
    return sorted(record.text or "" for record in load_records(f"{folder}{options}").records)


TRAIN, TEST = "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["train.jsonl", "dev.jsonl", "eval.jsonl", "val.jsonl"], ["train.jsonl"]),
        (["train/a.jsonl", "validation/a.jsonl", "test/a.jsonl"], ["train/a.jsonl"]),
        ([TRAIN, TEST], [TRAIN]),
        (["my_train.jsonl", "my_test.jsonl", "my_valid.jsonl"], ["my_train.jsonl"]),
        (["trainset.jsonl", "testset.jsonl"], ["trainset.jsonl"]),
        (["trainData.jsonl", "testData.jsonl"], ["trainData.jsonl"]),
        (["TRAIN.jsonl", "Held-Out.jsonl"], ["TRAIN.jsonl"]),
        (["chats.jsonl", "chats_test.jsonl"], ["chats.jsonl"]),
        (["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"], ["train_sft-00000-of-00001.jsonl"]),
        (["en/train.jsonl", "zh/train.jsonl", "zh/test.jsonl"], ["en/train.jsonl", "zh/train.jsonl"]),
        (
            ["latest.jsonl", "contest.jsonl", "evaluate_me.jsonl"],
            ["contest.jsonl", "evaluate_me.jsonl", "latest.jsonl"],
        ),
    ],
)
def test_the_training_files_of_a_folder_are_read_alone(tmp_path, names, taken):
    assert read(put(tmp_path, *names)) == taken


def test_what_was_left_out_is_told(tmp_path):
    notes = load_records(str(put(tmp_path, "train.jsonl", "test.jsonl", "more.jsonl"))).notes

    assert any("read the split train; left out test, 1 files of no split" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        (":split=test", ["test.jsonl"]),
        (":split=dev", ["val.jsonl"]),
        (":split=validation", ["val.jsonl"]),
        (":split=all", ["test.jsonl", "train.jsonl", "val.jsonl"]),
    ],
)
def test_another_split_is_read_when_it_is_asked_for(tmp_path, options, taken):
    assert read(put(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl"), options) == taken


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["test.jsonl"], "", "holds only test; name one"),
        (["train.jsonl", "test.jsonl"], ":split=trian", "no split 'trian'; it has test, train; did you mean train"),
        (["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"], "", "several splits to train on"),
    ],
)
def test_a_split_that_cannot_be_chosen_is_asked_for(tmp_path, names, options, message):
    with pytest.raises(DataError) as refused:
        read(put(tmp_path, *names), options)

    assert message.lower() in str(refused.value).lower()


def test_held_out_wins_where_folder_and_file_disagree():
    assert split_of(Path("test/train-1.jsonl")) == "test"
    assert split_of(Path("train/part-0.jsonl")) == "train"
    assert kind_of_split("protest") is None
    assert kind_of_split("train_and_test") == "test"


@pytest.mark.parametrize("name", ["gsm8k.test.jsonl", "wiki.eval.json.gz", "c4.train_and_dev.csv"])
def test_a_split_is_told_wherever_it_stands_in_the_name(name):
    assert split_of(Path(name)) in ("test", "validation")


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: ["a-*.jsonl", "more/**"]
  - split: test
    path: b.jsonl
- config_name: extra
  data_files: c.jsonl
---
# Data
"""


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ("", ["a-1.jsonl", "a-2.jsonl", "more/x/y.jsonl"]),
        (":split=test", ["b.jsonl"]),
        (":subset=extra", ["c.jsonl"]),
    ],
)
def test_a_readme_that_lists_splits_is_heeded(tmp_path, options, taken):
    put(tmp_path, "a-1.jsonl", "a-2.jsonl", "more/x/y.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")
    (tmp_path / "README.md").write_text(README)

    assert read(tmp_path, options) == taken


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        (
            "configs:\n- config_name: en\n  data_files: a.jsonl\n- config_name: de\n  data_files: b.jsonl",
            "subsets en, de",
        ),
        ("configs:\n- data_files:\n  - split: train\n    path: gone-*", "no such data file"),
        ("configs:\n- data_files: ../secret.jsonl", "no file of the folder"),
        ("configs:\n- data_files: https://example.com/a.jsonl", "no file of the folder"),
        ("configs:\n- data_files:\n    test: b.jsonl", "holds only test"),
    ],
)
def test_a_readme_that_cannot_be_followed_is_refused(tmp_path, readme, message):
    put(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "README.md").write_text(f"---\n{readme}\n---\n")

    with pytest.raises(AlignError, match=message):
        read(tmp_path)


def test_a_readme_without_a_readable_head_leaves_the_names_to_tell(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")

    found = load_records(str(tmp_path))

    assert [record.text for record in found.records] == ["train.jsonl"]
    assert any("the splits are taken from the names of the files" in note for note in found.notes)
