from __future__ import annotations

import json

import pytest

from align.data import load_records
from align.data.catalog import (
    FileDataset,
    HubDataset,
    MixtureDataset,
    VoteDataset,
    build_dataset,
    catalogue,
    find_dataset,
    source_datasets,
)
from align.data.load import read_row
from align.errors import DataError, UsageError
from align.schema import assistant, user
from align.strict_yaml import read_yaml

TALK = [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "At nine."}]


MIXED = {name for name in catalogue() if isinstance(find_dataset(name).config, MixtureDataset)}


@pytest.mark.parametrize("name", sorted(MIXED))
def test_every_shipped_mixture_is_made_of_shipped_datasets(name):
    assert {leaf.name for leaf in source_datasets(find_dataset(name))} <= set(catalogue())


@pytest.mark.parametrize("name", sorted(set(catalogue()) - MIXED))
def test_every_shipped_dataset_reads_its_example_row(name):
    config = build_dataset(read_yaml(catalogue()[name]))

    records = read_row(config.check.row, config.format, config.row_layout(config.format, None))

    expected = config.check.record if isinstance(config.check.record, list) else [config.check.record]
    fields = ("prompt", "completion", "chosen", "rejected", "label", "answer", "text", "tools", "id", "meta")
    held = [
        {key: value for key in fields if (value := getattr(record, key)) not in (None, [], {})} for record in records
    ]
    assert held == expected


def test_every_shipped_dataset_is_described():
    for name, path in catalogue().items():
        config = build_dataset(read_yaml(path))
        assert config.description, name
        assert config.license or name == "votes", name


def test_the_catalogue_of_the_working_directory_wins(tmp_path, monkeypatch):
    (tmp_path / "datasets_cfg").mkdir()
    (tmp_path / "datasets_cfg" / "alpaca.yaml").write_text("source: mine.jsonl\n")
    monkeypatch.chdir(tmp_path)

    assert find_dataset("alpaca").config.source == "mine.jsonl"
    assert find_dataset("gsm8k").config.subset == "main"


def test_a_yaml_names_columns_and_tags_of_its_own(tmp_path):
    turns = [{"speaker": "usr", "text": "When?"}, {"speaker": "sys", "text": "At nine."}]
    (tmp_path / "talks.json").write_text(json.dumps([{"dialogue": turns}]))
    recipe = "source: talks.json\nformat: messages\ncolumns: {messages: dialogue}\n"
    recipe += "tags: {role: speaker, content: text, user: usr, assistant: sys}\n"
    (tmp_path / "talks.yaml").write_text(recipe)

    [record] = load_records(str(tmp_path / "talks.yaml")).records

    assert record.prompt == [user("When?")]
    assert record.completion == [assistant("At nine.")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: a\nformt: alpaca", "formt: unknown setting; did you mean format"),
        ("source: a\nformat: alpacca", "unknown format 'alpacca'; did you mean alpaca"),
        ("source: a\nformat: alpaca\ncolumns: {promt: x}", "no part 'promt' in format alpaca; did you mean prompt"),
        ("source: a\ntags: {usr: x}", "no tag 'usr'"),
        ("format: alpaca", "source: missing"),
        ("source: a\nlimit: 0", "limit: "),
        ("source: a\nlimit: 1\nlimit: 2", "mine.yaml:3 limit: written twice"),
        ("source: a\nformt: alpaca", "mine.yaml: formt"),
    ],
)
def test_a_wrong_recipe_is_a_usage_error(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)

    with pytest.raises(UsageError) as refused:
        find_dataset(str(tmp_path / "mine.yaml"))

    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"source": "rows.jsonl"}, FileDataset),
        ({"source": "registry://world/sft.jsonl"}, FileDataset),
        ({"source": "hf://owner/name"}, HubDataset),
        ({"source": "registry://votes/", "format": "votes"}, VoteDataset),
        ({"source": "votes.jsonl", "voter": "ann"}, VoteDataset),
        ({"mix": [{"name": "a"}]}, MixtureDataset),
    ],
)
def test_the_settings_decide_the_kind_of_a_dataset(values, kind):
    assert type(build_dataset(values)) is kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"source": "rows.jsonl", "revision": "1" * 40},
            "revision: a setting of a hub dataset, and rows.jsonl is a file",
        ),
        ({"source": "hf://owner/name", "encoding": "gb18030"}, "encoding: a setting of a file or folder, and hf://"),
        ({"source": "hf://owner/name", "voter": "ann"}, "voter: a setting of votes, and hf://owner/name is a hub"),
        ({"source": "rows.jsonl", "stopping": "all_exhausted"}, "rows and stopping: belong to a mixture"),
        ({"mix": [{"name": "a"}], "ties": "both"}, "ties: not for a mixture, which has description, language"),
        ({"source": "a", "mix": [{"name": "a"}]}, "source: it has both"),
        ({"mix": [{"name": "a"}, {"name": "a"}]}, "a is listed twice"),
        ({"source": "hf://owner/name", "revison": "x"}, "revison: unknown setting; did you mean revision"),
    ],
)
def test_a_setting_of_another_kind_of_dataset_is_refused(values, message):
    with pytest.raises(UsageError) as refused:
        build_dataset(values)

    assert message in str(refused.value)


def test_options_behind_a_name():
    dataset = find_dataset("gsm8k:limit=5:split=test[:10%]:seed=2")

    assert (dataset.config.limit, dataset.config.split, dataset.config.seed) == (5, "test[:10%]", 2)
    assert dataset.config.subset == "main"
    with pytest.raises(UsageError, match="unknown option 'limt'; did you mean limit"):
        find_dataset("gsm8k:limt=5")
    with pytest.raises(UsageError, match="limit: 'many' is no whole number"):
        find_dataset("gsm8k:limit=many")


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(DataError, match=r"gsm8: no dataset of this name .*did you mean gsm8k"):
        find_dataset("gsm8")


def test_a_bare_hub_id_says_how_to_write_it():
    with pytest.raises(DataError, match="written hf://openai/gsm8k"):
        find_dataset("openai/gsm8k")


def test_a_split_of_a_local_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')

    with pytest.raises(UsageError, match="only a folder or a hub dataset has splits"):
        load_records(f"{tmp_path}/a.jsonl:split=test")


@pytest.fixture
def info(tmp_path):
    """A dataset_info.json as LLaMA-Factory users have it, with its files."""
    pair = {"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "No."}}
    openai = {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At nine."}]}
    files = {
        "plain.json": [{"instruction": "When?", "input": "", "output": "At nine."}] * 3,
        "columns.json": [{"ask": "When?", "reply": "At nine.", "sys": "s", "old": [["a", "b"]]}],
        "talk.json": [{"conversations": TALK, "tools": "[]"}],
        "pairs.json": [pair],
        "kto.json": [{**openai, "label": False}],
        "corpus.json": [{"text": "The shop opens at nine."}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps(rows))
    openai_tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"prompt": "ask", "response": "reply", "system": "sys", "history": "old"}
    pair_columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    kto_columns = {"messages": "messages", "kto_tag": "label"}
    entries = {
        "plain": {"file_name": "plain.json", "num_samples": 2},
        "columns": {"file_name": "columns.json", "columns": columns},
        "talk": {
            "file_name": "talk.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "tools": "tools"},
        },
        "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": pair_columns},
        "kto": {"file_name": "kto.json", "formatting": "sharegpt", "columns": kto_columns, "tags": openai_tags},
        "corpus": {"file_name": "corpus.json", "columns": {"prompt": "text"}},
        "hub": {"hf_hub_url": "someone/something", "subset": "en", "split": "validation"},
        "script": {"script_url": "load.py"},
        "images": {"file_name": "x.json", "formatting": "sharegpt", "columns": {"images": "images"}},
        "nowhere": {"ms_hub_url": "a/b"},
    }
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize(
    ("entry", "view", "count"),
    [
        ("plain", "demonstration", 2),
        ("columns", "demonstration", 1),
        ("talk", "demonstration", 1),
        ("pairs", "preference", 1),
        ("kto", "unpaired", 1),
        ("corpus", "text", 1),
    ],
)
def test_llama_factory_entries_are_taken_as_they_stand(info, entry, view, count):
    found = load_records(f"{info}:entry={entry}", view=view)

    assert found.name == entry
    assert found.rows == count
    assert found.records[0].text or found.records[0].prompt[-1]["content"] in ("When?", "a")


def test_a_recipe_may_point_at_an_entry(info):
    (info.parent / "mine.yaml").write_text("source: dataset_info.json\nentry: plain\nlimit: 1\n")

    assert load_records(str(info.parent / "mine.yaml")).rows == 1


def test_entries_on_the_hub_keep_subset_and_split(info):
    config = find_dataset(f"{info}:entry=hub").config

    assert (config.source, config.subset, config.split) == ("hf://someone/something", "en", "validation")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("plian", "no entry 'plian'; .*did you mean plain"),
        ("script", "loaded by a script, which is not run"),
        ("images", "it holds images; only text"),
        ("nowhere", "neither file_name nor hf_hub_url"),
    ],
)
def test_entries_that_cannot_be_used_say_why(info, entry, message):
    with pytest.raises(DataError, match=message):
        find_dataset(f"{info}:entry={entry}")


def test_a_dataset_info_needs_an_entry(info):
    with pytest.raises(DataError, match=r"no entry is named; write .*:entry=NAME"):
        find_dataset(str(info))


@pytest.mark.parametrize(
    "text", ["- - Hello\n  - Hi\n", "categories:\n- greetings\nconversations:\n- - Hello\n  - Hi\n"]
)
def test_a_yaml_of_rows_is_read_as_such(tmp_path, text):
    (tmp_path / "talks.yml").write_text(text)

    [record] = load_records(f"{tmp_path / 'talks.yml'}:limit=2").records

    assert (record.prompt, record.completion) == ([user("Hello")], [assistant("Hi")])


def test_a_yaml_that_is_neither_rows_nor_a_recipe_says_what_it_has(tmp_path):
    (tmp_path / "talks.yaml").write_text("conversations: []\nlanguage: en\n")

    with pytest.raises(
        DataError, match=r"talks\.yaml: a YAML file describes .* this one has conversations, language; "
    ):
        load_records(str(tmp_path / "talks.yaml"))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A local hub cache that holds one file of one dataset, at a commit and as main."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "1" * 40
    repository = tmp_path / "hub" / "datasets--owner--pairs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    part = repository / "snapshots" / commit / "harmless-base"
    part.mkdir(parents=True)
    (part / "train.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    return commit


def test_a_file_of_a_hub_dataset_is_read_from_the_cache(hub_cache, tmp_path):
    source = "hf://owner/pairs/harmless-base/train.jsonl"
    (tmp_path / "mine.yaml").write_text(f"source: {source}\nrevision: '{hub_cache}'\n")

    for spec in (source, f"{source}:revision={hub_cache}", str(tmp_path / "mine.yaml")):
        [record] = load_records(spec).records
        assert record.where == f"{source}:1"


def test_a_file_that_is_not_on_the_hub_or_not_at_that_revision_is_a_data_error(hub_cache):
    with pytest.raises(DataError, match=r"hf://owner/pairs/none.jsonl: the file cannot be fetched"):
        load_records("hf://owner/pairs/none.jsonl")
    with pytest.raises(DataError, match="check its name and the revision"):
        load_records("hf://owner/pairs/harmless-base/train.jsonl:revision=" + "2" * 40)
