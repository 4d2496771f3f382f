"""Layouts that public files often have are told without a format; others come with a draft to begin with."""

from __future__ import annotations

import csv
import json

import pytest

from align.data import load_records
from align.data.catalog import find_dataset
from align.errors import DataError, UsageError


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(record):
    return [(turn["role"], turn["content"]) for turn in [*record.prompt, *(record.completion or [])]]


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "q", "output": "a"},
        {"question": "q", "std_answer": "a"},
        {"question": "q", "response": "a"},
        {"prompt": "q", "response": "a"},
        {"query": "q", "answer": "a"},
        {"utterances": [{"speaker": "user", "utterance": "q"}, {"speaker": "agent", "utterance": "a"}]},
        {"messages": [{"role": "usr", "content": "q"}, {"role": "sys", "content": "a"}]},
        {"dialogue": [{"speaker": "USER", "utterance": "q"}, {"speaker": "SYSTEM", "utterance": "a"}]},
        {"messages": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]},
    ],
)
def test_common_columns_and_tags_are_told(tmp_path, row):
    assert turns(load_records(lines(tmp_path / "a.jsonl", row)).records[0]) == QA


def test_sys_is_a_system_turn_where_another_answers(tmp_path):
    talk = [{"role": role, "content": role} for role in ("sys", "usr", "bot")]

    [record] = load_records(lines(tmp_path / "a.jsonl", {"messages": talk})).records

    assert [role for role, _ in turns(record)] == ["system", "user", "assistant"]


@pytest.mark.parametrize("talk", [["q"], [{"role": "user", "content": "q"}], [{"content": "q"}]])
def test_a_list_with_one_turn_is_a_prompt(tmp_path, talk):
    [record] = load_records(lines(tmp_path / "a.jsonl", {"messages": talk})).records

    assert (turns(record), record.completion) == ([("user", "q")], None)


@pytest.mark.parametrize(
    "rows", ["[[q, a]]", "[{messages: [{role: user, content: q}, {role: assistant, content: a}]}]"]
)
def test_a_yaml_with_categories_and_conversations_is_data(tmp_path, rows):
    (tmp_path / "a.yml").write_text(f"categories: [x]\nconversations: {rows}\n")

    assert turns(load_records(str(tmp_path / "a.yml")).records[0]) == QA


def test_a_yaml_with_one_conversation_is_one_row(tmp_path):
    talk = "[{role: user, content: q}, {role: assistant, content: a}]"
    (tmp_path / "a.yml").write_text(f"categories: [x]\nconversations: {talk}\n")

    assert turns(load_records(str(tmp_path / "a.yml")).records[0]) == QA


def message(talk, role, content, **more):
    return {"conversation_id": talk, "role": role, "content": content, **more}


def test_messages_of_a_conversation_become_one_row(tmp_path):
    rows = [message("x", "user", "q", lang="en"), message("x", "assistant", "a", lang="en")]

    found = load_records(lines(tmp_path / "a.jsonl", *rows, message(2, "user", "q"), message(2, "assistant", "a")))

    assert [turns(record) for record in found.records] == [QA, QA]
    assert [record.id for record in found.records] == ["x", "2"]
    assert found.records[0].meta == {"lang": "en"}
    assert any("one message a row" in note for note in found.notes)


def test_messages_come_in_the_order_that_a_column_tells(tmp_path):
    rows = [message(1, "assistant", "a", turn=10), message(1, "user", "q", turn=9)]
    with (tmp_path / "a.csv").open("w") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    assert turns(load_records(str(tmp_path / "a.csv")).records[0]) == QA


def test_a_conversation_that_comes_back_is_refused(tmp_path):
    rows = [message(talk, role, "x") for talk, role in ((1, "user"), (2, "user"), (1, "assistant"))]

    with pytest.raises(DataError, match=r":3 conversation_id: 1 comes back .*sort the rows"):
        load_records(lines(tmp_path / "a.jsonl", *rows))


def test_a_class_beside_a_text_is_told_and_can_be_learned(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "good film", "label": "pos"}, {"text": "bad film", "label": 0.0})

    assert any("label is not learned" in note and ":format=labels" in note for note in load_records(path).notes)
    found = load_records(f"{path}:format=labels")
    assert [turns(record) for record in found.records] == [
        [("user", "good film"), ("assistant", "pos")],
        [("user", "bad film"), ("assistant", "0")],
    ]


def test_columns_are_named_behind_the_file(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"Frage": "q", "Antwort": "a"})

    assert turns(load_records(f"{path}:prompt=Frage,completion=Antwort").records[0]) == QA
    assert turns(load_records(f"{path}:prompt=Frage,completion=Antwort,limit=1").records[0]) == QA
    assert load_records(f"{path}:text=Antwort").records[0].text == "a"
    with pytest.raises(DataError, match="Fragen"):
        load_records(f"{path}:prompt=Fragen,completion=Antwort")
    with pytest.raises(UsageError, match="unknown option 'promt'; did you mean prompt"):
        find_dataset(f"{path}:promt=Frage")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Frage": "what is it?", "Antwort": "it is a dog"}, "prompt_completion,prompt=Frage,completion=Antwort"),
        ({"id": 3, "user_query": "q", "bot_reply": "a"}, "prompt_completion,prompt=user_query,completion=bot_reply"),
        ({"q": "is it?", "good_one": "yes", "bad_one": "no"}, "preference,prompt=q,chosen=good_one,rejected=bad_one"),
        ({"body": "one long text of words"}, "text,text=body"),
    ],
)
def test_a_format_that_cannot_be_told_comes_with_a_draft_that_works(tmp_path, row, expected):
    path = lines(tmp_path / "a.jsonl", row)

    with pytest.raises(DataError) as refused:
        load_records(path)

    assert f"source: {path}" in str(refused.value)
    assert f"data={path}:format={expected}" in str(refused.value)
    assert len(load_records(f"{path}:format={expected}").records) == 1


def test_the_draft_names_the_keys_of_turns(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"chat": [{"who": "user", "what": "q"}, {"who": "assistant", "what": "a"}]})

    with pytest.raises(DataError) as refused:
        load_records(path)

    draft = str(refused.value).split("plays which part):\n")[1]
    (tmp_path / "draft.yaml").write_text(draft)
    assert turns(load_records(str(tmp_path / "draft.yaml")).records[0]) == QA


def test_a_column_that_was_not_taken_for_its_part_is_told(tmp_path):
    found = load_records(lines(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a", "input": "more"}))

    assert any("columns kept as meta: input" in note for note in found.notes)
