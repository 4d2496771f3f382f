"""The shapes of public files beyond the common ones: what each is taken for, and what it becomes."""

from __future__ import annotations

import json

import pytest

from align.data import load_records
from align.data.formats import FORMATS, Format, has_columns
from align.data.formats.row_layout import COMMON
from align.errors import DataError, UsageError
from align.schema import Record, assistant, user

ASK, ANSWER = user("When?"), assistant("At nine.")


@pytest.fixture
def load(tmp_path):
    """Load rows (or the content of a file) with the settings of a recipe."""

    def load_rows(rows, *, name: str = "rows.jsonl", recipe: str = "", **settings):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / "recipe.yaml").write_text(f"source: {name}\n{recipe}")
        return load_records(str(tmp_path / "recipe.yaml"), **settings)

    return load_rows


def essence(record: Record) -> dict:
    parts = {"prompt": record.prompt, "completion": record.completion, "label": record.label, "answer": record.answer}
    parts |= {"chosen": record.chosen, "rejected": record.rejected, "weight": record.weight}
    return {name: value for name, value in parts.items() if value is not None}


def pair(prompt, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


TREE = {
    "message_tree_id": "t1",
    "prompt": {
        "role": "prompter",
        "text": "When?",
        "replies": [
            {"role": "assistant", "text": "Late.", "rank": 1, "replies": []},
            {
                "role": "assistant",
                "text": "At nine.",
                "rank": 0,
                "replies": [
                    {
                        "role": "prompter",
                        "text": "And?",
                        "rank": 0,
                        "replies": [
                            {"role": "assistant", "text": "At five.", "rank": 0},
                            {"role": "assistant", "text": "Never.", "rank": 1},
                            {"role": "assistant", "text": "Unjudged.", "rank": None},
                        ],
                    }
                ],
            },
            {"role": "assistant", "text": "No.", "rank": 2},
        ],
    },
}
NECTAR = {
    "prompt": "When?",
    "answers": [{"answer": "No.", "rank": 3}, {"answer": "At nine.", "rank": 1}, {"answer": "Late.", "rank": 3}],
}
SOLVED = {
    "question": "2 + 2?",
    "ground_truth": "4",
    "small": {"is_correct": False, "solution": "5"},
    "large": {"is_correct": True, "solution": "It is 4."},
    "other": {"is_correct": True, "solution": "Four."},
}
ARTICLE = {
    "title": "hours",
    "paragraphs": [
        {
            "context": "We open at nine.",
            "qas": [
                {
                    "id": "q1",
                    "question": "When?",
                    "answers": [{"text": "nine", "answer_start": 11}, {"text": "at nine"}],
                },
                {"id": "q2", "question": "Where?", "answers": [], "is_impossible": True},
            ],
        }
    ],
}
HOURS = [user("We open at nine.\n\nWhen?")]
NINE = {"prompt": HOURS, "completion": [assistant("nine")], "answer": "nine"}
LETTERS = [user("When?\n(A) nine\n(B) ten")]
TEN = {"prompt": LETTERS, "completion": [assistant("(B) ten")], "answer": "(B)"}
SHAPES = {
    "a tree of replies": (
        TREE,
        None,
        "format ranked, decided by a tree",
        [
            pair([ASK], "At nine.", "Late."),
            pair([ASK], "At nine.", "No."),
            pair([ASK], "Late.", "No."),
            pair([ASK, ANSWER, user("And?")], "At five.", "Never."),
        ],
    ),
    "the best of a tree": (
        TREE,
        "demonstration",
        "format ranked",
        [
            {"prompt": [ASK], "completion": [ANSWER]},
            {"prompt": [ASK, ANSWER, user("And?")], "completion": [assistant("At five.")]},
        ],
    ),
    "answers with ranks, two of them equal": (
        NECTAR,
        None,
        "format ranked, decided by answers with a rank",
        [pair([ASK], "At nine.", "No."), pair([ASK], "At nine.", "Late.")],
    ),
    "turns without roles": (
        {"dialogue": ["When?", "At nine."]},
        None,
        "format turns, decided by a list of turns without roles under dialogue",
        [{"prompt": [ASK], "completion": [ANSWER]}],
    ),
    "turns under a key of their own": (
        {"name": "x", "messages": [{"message": "When?"}, {"message": "At nine.", "attrs": []}]},
        None,
        "turns of a message without roles under messages",
        [{"prompt": [ASK], "completion": [ANSWER]}],
    ),
    "speakers": (
        {"utterances": [{"speaker": "USER", "text": "When?"}, {"speaker": "ASSISTANT", "text": "At nine."}]},
        None,
        "format speakers, decided by turns with speaker and text",
        [{"prompt": [ASK], "completion": [ANSWER]}],
    ),
    "SQuAD": (ARTICLE, None, "format squad", [NINE]),
    "SQuAD, flat": (
        {"context": "We open at nine.", "question": "When?", "answers": {"text": ["nine"], "answer_start": [11]}},
        None,
        "format squad",
        [NINE],
    ),
    "CMRC, as first published": (
        {"context_text": "We open at nine.", "qas": [{"query_text": "When?", "query_id": "1", "answers": ["nine"]}]},
        None,
        "format squad",
        [NINE],
    ),
    "a choice by number": (
        {"question": "When?", "choices": ["nine", "ten"], "answer": 1},
        None,
        "format choice",
        [TEN],
    ),
    "a choice by letter": (
        {"question": "When?", "choices": {"text": ["nine", "ten"], "label": ["A", "B"]}, "answerKey": "B"},
        None,
        "format choice",
        [TEN],
    ),
    "an input and a target": (
        {"input": "not True", "target": "False"},
        None,
        "format qa, decided by columns input and target",
        [{"prompt": [user("not True")], "completion": [assistant("False")], "answer": "False"}],
    ),
    "solutions, each judged": (
        SOLVED,
        None,
        "format solutions",
        [
            {"prompt": [user("2 + 2?")], "completion": [assistant(text)], "label": good, "answer": "4"}
            for text, good in (("5", False), ("It is 4.", True), ("Four.", True))
        ],
    ),
    "right solutions against wrong ones": (
        SOLVED,
        "preference",
        "format solutions",
        [pair([user("2 + 2?")], good, "5") | {"answer": "4"} for good in ("It is 4.", "Four.")],
    ),
    "the question alone": (SOLVED, "prompt", "format solutions", [{"prompt": [user("2 + 2?")], "answer": "4"}]),
    "OpenAI preference fine-tuning": (
        {
            "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [assistant("No.")],
        },
        None,
        "format preferred_output",
        [pair([ASK], "At nine.", "No.")],
    ),
    "ms-swift": (
        {"messages": [ASK, ANSWER], "rejected_response": "No."},
        None,
        "format messages",
        [pair([ASK], "At nine.", "No.")],
    ),
    "ms-swift with whole conversations": (
        {"messages": [ASK, ANSWER], "rejected_messages": [ASK, assistant("No.")]},
        None,
        "format messages",
        [pair([ASK], "At nine.", "No.")],
    ),
    "axolotl": (
        {"instruction": "When?", "chosen_response": "At nine.", "rejected_response": "No."},
        None,
        "format alpaca, decided by columns instruction, chosen_response",
        [pair([ASK], "At nine.", "No.")],
    ),
    "a pair beside a copy of its chosen side": (
        {"prompt": "When?", "messages": [ASK, ANSWER], "chosen": [ASK, ANSWER], "rejected": [ASK, assistant("No.")]},
        None,
        "format preference",
        [pair([ASK], "At nine.", "No.")],
    ),
    "two conversations and a winner": (
        {"conversation_a": [ASK, assistant("No.")], "conversation_b": [ASK, ANSWER], "winner": "model_b"},
        None,
        "format pairs",
        [pair([ASK], "At nine.", "No.")],
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_public_shape_is_recognised_and_read(load, case):
    row, view, decided, expected = SHAPES[case]

    found = load([row], view=view)

    assert [essence(record) for record in found.records] == expected
    assert any(decided in note for note in found.notes)


def test_lines_that_are_lists_are_conversations_without_roles(load):
    found = load([["When?", "At nine.", "And?"], ["Why?", "Because."]])

    assert [essence(record) for record in found.records] == [
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": [user("Why?")], "completion": [assistant("Because.")]},
    ]
    assert any("1 conversations without roles end with a line that nobody answers" in note for note in found.notes)


def test_what_can_be_no_example_is_counted_not_refused(load):
    single = {"prompt": "When?", "answers": [{"answer": "At nine.", "rank": 1}]}

    assert load([ARTICLE]).dropped == {"question without an answer": 1}
    assert load([NECTAR, single]).dropped == {"no answers of different rank": 1}


SPELLINGS = [(1, 2), ("1", "2"), (1.0, 2.0), (1.02, 1.98), ("A", "B"), (" a ", "b"), ("A>B", "B>A"), ("A>>B", "B>>A")]
SPELLINGS += [("B<A", "A<B"), ("[[A>B]]", "[[B>A]]"), ("[[A]]", "[[B]]"), ("model_a", "model_b")]


@pytest.mark.parametrize(("first", "second"), SPELLINGS)
def test_verdicts_are_read_in_their_usual_spellings(load, first, second):
    row = {"question": "When?", "response_A": "At nine.", "response_B": "No."}

    found = load([row | {"label": first}, row | {"label": second}])

    assert [record.chosen for record in found.records] == [[ANSWER], [assistant("No.")]]


@pytest.mark.parametrize("label", [0, "0", 1.5, "A=B", "tie", "Tie", "tie (bothbad)"])
def test_ties_are_dropped_kept_both_ways_or_in_one_of_them(load, label):
    row = {"question": "When?", "response_A": "At nine.", "response_B": "No.", "label": label}
    fair = row | {"label": 1}

    assert load([row, fair]).dropped == {"tie": 1}
    both = load([row], recipe="format: pairs\nties: both\n").records
    many = [row | {"question": f"When {number}?"} for number in range(60)]
    half = load(many, recipe="format: pairs\nties: half\n").records

    assert [record.chosen[0]["content"] for record in both] == ["At nine.", "No."]
    assert len(half) == 60
    assert 15 < sum(record.chosen[0]["content"] == "No." for record in half) < 45
    assert half == load(many, recipe="format: pairs\nties: half\n").records


@pytest.mark.parametrize("spelling", ["{yes: false, no: true}", "{'yes': false, 'no': true}", "{Yes: false, NO: true}"])
def test_a_label_map_says_what_is_good(load, spelling):
    rows = [{"q": "When?", "a": "At nine.", "verdict": word} for word in ("yes", "no")]
    columns = "columns: {prompt: q, completion: a, label: verdict}\n"

    found = load(rows, recipe=f"format: unpaired\n{columns}label_map: {spelling}\n")

    assert [record.label for record in found.records] == [False, True]


def test_turns_are_trained_or_not_as_each_says(load):
    turns = [ASK, ANSWER, user("And?"), assistant("Five.")]
    for key, value in (("weight", 0), ("train", False), ("loss", False), ("loss_scale", 0.0)):
        marked = [*turns[:1], turns[1] | {key: value}, *turns[2:]]

        [record] = load([{"messages": marked}]).records

        assert [turn.get("train", True) for turn in record.completion] == [False, True, True]


TSV = "When?\tAt nine.\nWhy?\tBecause.\n"


def test_a_table_without_a_header_gets_one_from_the_recipe(load):
    found = load(TSV, name="a.tsv", recipe="header: [question, answer]\n")

    assert [record.prompt[0]["content"] for record in found.records] == ["When?", "Why?"]
    assert [record.line for record in found.records] == [1, 2]


@pytest.mark.parametrize(
    ("quoting", "answers"), [("none", ['"At', 'nine."']), ("csv", ["At\nnine."]), ("auto", ["At\nnine."])]
)
def test_quotes_of_a_table_are_taken_as_the_recipe_says(load, quoting, answers):
    table = {
        "none": 'instruction\toutput\nq\t"At\nq\tnine."\n',
        "csv": 'instruction\toutput\nq\t"At\nnine."\n',
        "auto": 'instruction\toutput\nq\t"At\nnine."\n',
    }[quoting]

    found = load(table, name="a.tsv", recipe=f"quoting: {quoting}\n")

    assert [record.completion[0]["content"] for record in found.records] == answers


def test_other_separators_are_noticed_and_a_doubled_header_refused(load):
    found = load("instruction;output\nq;a\n", name="a.csv")

    assert [record.completion for record in found.records] == [[assistant("a")]]
    assert any("separated by ';'" in note for note in found.notes)
    with pytest.raises(DataError, match=r"a\.csv:1 'x': written twice in the header"):
        load("x,x\n1,2\n", name="a.csv")


OBJECTS = {
    "rows by id": ({"d1": {"messages": [ASK, ANSWER]}, "d2": {"messages": [ASK, ANSWER]}}, "", ["d1", "d2"]),
    "one row": ({"id": "7", "messages": [ASK, ANSWER]}, "", ["7"]),
    "rows under a path": (
        {
            "books": [
                {"items": [{"id": "1", "messages": [ASK, ANSWER]}]},
                {"items": [{"id": "2", "messages": [ASK, ANSWER]}]},
            ]
        },
        "rows_at: books.items\n",
        ["1", "2"],
    ),
    "another split": (
        {"train": [{"id": "1", "messages": [ASK, ANSWER]}], "test": [{"id": "2", "messages": [ASK, ANSWER]}]},
        "rows_at: test\n",
        ["2"],
    ),
    "the usual split": (
        {"train": [{"id": "1", "messages": [ASK, ANSWER]}], "test": [{"id": "2", "messages": [ASK, ANSWER]}]},
        "",
        ["1"],
    ),
}


@pytest.mark.parametrize("case", OBJECTS)
@pytest.mark.parametrize("name", ["a.json", "a.yml"])
def test_rows_are_found_in_an_object(load, case, name):
    whole, recipe, ids = OBJECTS[case]

    found = load(json.dumps(whole), name=name, recipe=recipe)

    assert [record.id for record in found.records] == ids
    assert any("row" in note for note in found.notes)


def test_a_split_that_was_left_out_is_named(load):
    notes = load(json.dumps(OBJECTS["the usual split"][0]), name="a.json").notes

    assert any("the splits test were left out; write `rows_at: test`" in note for note in notes)


def test_an_object_without_rows_and_a_wrong_path_are_refused(load):
    with pytest.raises(DataError, match=r"holds one object with \['a', 'b'\], not rows; .*rows_at: KEY"):
        load('{"a": 1, "b": [2]}', name="a.json")
    with pytest.raises(DataError, match="nothing is at rows_at: c; its keys are"):
        load('{"a": 1, "b": [2]}', name="a.json", recipe="rows_at: c\n")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("a.jsonl", "header: [a, b]"),
        ("a.jsonl", "quoting: none"),
        ("a.jsonl", "rows_at: data"),
        ("a.json", "rows_at: data"),
        ("a.csv", "rows_at: data"),
        ("a.parquet", "encoding: gb18030"),
    ],
)
def test_settings_that_mean_nothing_for_a_file_are_refused(load, name, recipe):
    with pytest.raises(UsageError, match=f"{recipe.partition(':')[0]} means nothing"):
        load([{"messages": [ASK, ANSWER]}] * 2, name=name, recipe=recipe + "\n")


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "rot13"])
def test_what_is_no_encoding_of_text_is_refused(load, encoding):
    with pytest.raises(UsageError, match=f"encoding: '{encoding}' is not known"):
        load([{"messages": [ASK, ANSWER]}], recipe=f"encoding: {encoding}\n")


def test_yaml_in_a_folder_is_data_only_when_it_is_alone(tmp_path):
    (tmp_path / "a.yml").write_text("- [Hello, At nine.]\n")

    assert load_records(str(tmp_path)).rows == 1
    (tmp_path / "b.jsonl").write_text((json.dumps({"messages": [ASK, ANSWER]}) + "\n") * 2)
    assert load_records(str(tmp_path)).rows == 2


def test_many_unknown_columns_are_not_all_listed(load):
    [note] = [note for note in load([{"text": "a"} | {f"c{n}": n for n in range(50)}]).notes if "meta" in note]

    assert "c0, c1," in note
    assert note.endswith("c19 and 30 more")


def test_yaml_that_repeats_itself_by_aliases_is_refused(load):
    with pytest.raises(DataError, match=r"repeats a value by an alias \(\*name\); write it out"):
        load("- &a [hello, hi]\n- *a\n", name="a.yml")


def test_a_minority_of_known_rows_decides_nothing(load):
    rows = [{"messages": [ASK, ANSWER]}] + [{"x": 1}] * 3

    with pytest.raises(
        DataError, match="the format cannot be recognised from the columns messages; write a dataset YAML"
    ):
        load(rows)


@pytest.mark.parametrize("column", ["conversation_id", "prompts", "response2", "answers_de", "contents"])
def test_longer_names_are_no_slips(load, column):
    assert load([{"messages": [ASK, ANSWER], column: "x"}]).rows == 1


@pytest.mark.parametrize("column", ["chosn", "promt", "instuction", "mesages", "rejectd", "lable", "compltion"])
def test_slips_that_would_decide_are_refused(load, column):
    with pytest.raises(DataError, match=f"the column '{column}' is nearly called"):
        load([{"text": "a", column: "x"}])


def test_a_new_format_is_one_entry_of_the_table(tmp_path, monkeypatch):
    def read_riddle(row, layout):
        return [Record(prompt=[user(layout.text(row, "riddle", "empty prompt"))], answer=layout.reference(row))]

    riddles = Format(
        read_riddle, {"riddle": ("riddle",), "answer": ("secret",), **COMMON}, has_columns(("riddle", "secret"))
    )
    monkeypatch.setitem(FORMATS, "riddles", riddles)
    (tmp_path / "a.jsonl").write_text(json.dumps({"riddle": "What has keys?", "secret": "a piano", "id": 7}) + "\n")

    told, asked = load_records(f"{tmp_path}/a.jsonl"), load_records(f"{tmp_path}/a.jsonl:format=riddles")

    assert any("format riddles, decided by columns riddle and secret" in note for note in told.notes)
    assert [(record.prompt, record.answer, record.id) for record in told.records] == [
        ([user("What has keys?")], "a piano", "7")
    ]
    assert asked.digest == told.digest
