"""The shapes of the field's evaluation sets: what their rows become, and how a YAML reads a file of one's own."""

from __future__ import annotations

import json

import pytest
from fake_engine import FakeEngine

from align.data import load_records
from align.data.__main__ import main
from align.data.catalog import catalogue, find_dataset
from align.engine.protocol import Sampling
from align.errors import DataError, UsageError
from align.evaluation.completions import generate_completions
from align.evaluation.scorers import scorer_named
from align.schema import Record, assistant, user


@pytest.fixture
def rows_file(tmp_path):
    """Write rows as JSON-lines and give the path."""

    def write(*rows) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


SCORED = {name: scorer for name in catalogue() if (scorer := find_dataset(name).scorer)}


@pytest.mark.parametrize("name", sorted(SCORED))
def test_every_shipped_scorer_exists_and_has_what_it_needs_in_the_example_row(name, rows_file):
    config = find_dataset(name).config
    [record] = load_records(f"{name}:source={rows_file(config.check.row)}").records

    scorer_named(SCORED[name]).check([record])


def test_a_shipped_dataset_reads_a_file_of_ones_own(rows_file):
    path = rows_file({"question": "2 + 2?", "answer": "It is 4.\n#### 4"})

    dataset = find_dataset(f"gsm8k:source={path}")

    assert dataset.name == "gsm8k:rows.jsonl"
    assert (dataset.config.scorer, dataset.config.subset) == ("gsm8k", None)
    assert load_records(f"gsm8k:source={path}").records[0].answer == "4"


def test_data_check_knows_the_scorers(rows_file, capsys):
    path = rows_file({"prompt": "When?"})

    assert main(["check", f"{path}:scorer=ifeval"]) == 0
    assert main(["check", f"{path}:scorer=ifevla"]) == 2
    assert "scorer: asked for 'ifevla'; no scorer has that name; did you mean ifeval?" in capsys.readouterr().err


def test_a_file_may_name_its_scorer(rows_file):
    assert find_dataset(f"{rows_file({'prompt': 'When?'})}:scorer=ifeval").config.scorer == "ifeval"


def test_a_scorer_that_is_no_name_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("source: rows.jsonl\nscorer: os.system\n")

    with pytest.raises(UsageError, match=r"mine.yaml: scorer"):
        find_dataset(str(tmp_path / "mine.yaml"))


def test_classes_are_named_and_asked_for(rows_file, tmp_path):
    path = rows_file({"a": "It is open.", "b": "It is shut.", "label": 1.0}, {"a": "x", "b": "y", "label": -1})
    recipe = f"source: {path}\nformat: labels\ncolumns: {{prompt: [a, b]}}\nlabels: {{0: same, 1: other}}\n"
    (tmp_path / "mine.yaml").write_text(recipe + "question: Same or other?\n")

    found = load_records(str(tmp_path / "mine.yaml"))

    [record] = found.records
    assert record.prompt == [user("Same or other?\n\na: It is open.\nb: It is shut.")]
    assert (record.completion, record.answer) == ([assistant("other")], "other")
    assert record.meta == {"labels": ["same", "other"]}
    assert found.dropped == {"no label": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 7}, "label: is 7, which labels does not know; known: 0, 1"),
        ({"text": "", "label": 0}, "text: is empty"),
        ({"text": "x"}, "label: no such column"),
        ({"label": 0}, "text: no such column"),
    ],
)
def test_a_row_without_a_class_is_told(rows_file, tmp_path, row, message):
    (tmp_path / "mine.yaml").write_text(f"source: {rows_file(row)}\nformat: labels\nlabels: {{0: bad, 1: good}}\n")

    with pytest.raises(DataError) as refused:
        load_records(str(tmp_path / "mine.yaml"))

    assert message in str(refused.value)


@pytest.mark.parametrize("recipe", ["format: qa\nlabels: {0: a}", "format: qa\nquestion: Which?"])
def test_labels_belong_to_their_format(tmp_path, recipe):
    (tmp_path / "mine.yaml").write_text(f"source: x.jsonl\n{recipe}\n")

    with pytest.raises(UsageError, match="labels and question: belong to format labels"):
        find_dataset(str(tmp_path / "mine.yaml"))


def test_choices_may_be_columns(rows_file):
    path = rows_file({"question": "几点？", "A": "八点", "B": "九点", "answer": "B"})

    found = load_records(path)

    [record] = found.records
    assert record.prompt == [user("几点？\n(A) 八点\n(B) 九点")]
    assert (record.answer, record.meta) == ("(B)", {"labels": ["A", "B"]})
    assert "format choice, decided by columns question, A and B" in found.notes[0]


def test_all_references_of_a_question_are_kept_once(rows_file):
    answers = [{"text": "nine"}, {"text": "at nine"}, {"text": "nine"}, {"text": None}]
    path = rows_file({"context": "We open at nine.", "question": "When?", "answers": answers})

    [record] = load_records(path).records

    assert (record.answer, record.meta["answers"]) == ("nine", ["nine", "at nine"])


def test_questions_are_asked_one_after_the_other(rows_file):
    path = rows_file({"question_id": 81, "turns": ["When?", "And in winter?"]})

    [record] = load_records(f"{path}:format=questions").records

    assert (record.id, record.prompt, record.meta) == ("81", [user("When?")], {"follow_ups": ["And in winter?"]})
    with pytest.raises(DataError, match=r"turns\[1\]: is a number, not text"):
        load_records(f"{rows_file({'turns': ['When?', 3]})}:format=questions")


def test_the_next_question_is_asked_after_each_models_own_answer():
    heard = []

    def reply(row):
        heard.append((row.model, [turn["content"] for turn in row.messages]))
        return None if row.messages[-1]["content"] == "Fail." else f"{row.model} {len(row.messages)}"

    records = [
        Record(prompt=[user("When?")], meta={"follow_ups": ["And in winter?", "Why?"]}),
        Record(prompt=[user("Where?")]),
        Record(prompt=[user("Who?")], meta={"follow_ups": ["Fail."]}),
    ]
    written, failed = generate_completions(FakeEngine(["a", "b"], reply), ["a", "b"], records, Sampling())

    assert [turn["content"] for turn in written["b"][0].turns] == ["b 1", "And in winter?", "b 3", "Why?", "b 5"]
    assert written["a"][0].text == "a 1\n\nuser: And in winter?\n\nassistant: a 3\n\nuser: Why?\n\nassistant: a 5"
    assert (written["a"][0].tokens, written["a"][0].ended) == (6, True)
    assert written["a"][1].text == "a 1"
    assert (written["a"][2], sum(failed.values())) == (None, 2)
    assert ("b", ["When?", "b 1", "And in winter?"]) in heard


# Counted by plain json and csv, not by this loader.
@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("gsm8k:source={}/verifiable/gsm8k_test.jsonl", 658),
        ("truthfulqa:source={}/eval/truthfulqa_mc.json", 407),
        ("mt-bench:source={}/eval/mt_bench_question.jsonl", 80),
        ("ifeval:source={}/eval/ifeval.jsonl", 270),
        ("xquad:source={}/eval/xquad__xquad.en.json", 1190),
        ("cmrc2018:source={}/eval/cmrc2018__cmrc2018_dev.json", 3219),
        ("humaneval:source={}/eval/humaneval__HumanEval.jsonl.gz", 164),
        *((f"bbh:source={{}}/verifiable/bbh_{task}.json", 250) for task in ("navigate", "date_understanding")),
    ],
)
def test_the_shipped_sets_read_the_published_files(real_data, spec, rows):
    found = load_records(spec.format(real_data))

    assert (found.rows, found.dropped) == (rows, {})
    scorer = find_dataset(spec).config.scorer
    if scorer:
        scorer_named(scorer).check(found.records)
