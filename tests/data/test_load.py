from __future__ import annotations

import gzip
import json

import pytest

from align.data import load_records
from align.data.formats.row_layout import read_label
from align.data.formats.turns import split_pair
from align.data.load import open_scan
from align.data.row_errors import RowError
from align.errors import DataError, UsageError
from align.schema import Record, assistant, user

ASKED = [user("When?")]
ANSWERED = [assistant("At nine.")]
GOOD = {
    "messages": {"messages": [*ASKED, *ANSWERED]},
    "prompt_completion": {"prompt": "When?", "completion": "At nine."},
    "unpaired": {"prompt": "When?", "completion": "At nine.", "label": True},
    "preference": {"prompt": "When?", "chosen": "At nine.", "rejected": "No."},
    "hh": {"chosen": "\n\nHuman: When?\n\nAssistant: At nine.", "rejected": "\n\nHuman: When?\n\nAssistant: No."},
    "alpaca": {"instruction": "When?", "input": "", "output": "At nine."},
    "sharegpt": {"conversations": [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "At nine."}]},
    "qa": {"question": "When?", "answer": "At nine."},
    "pairs": {"input": "When?", "output_1": "At nine.", "output_2": "No.", "label": 1},
    "votes": {"id": "1", "prompt": ASKED, "a": ANSWERED, "b": [assistant("No.")], "choice": "a"},
    "prompt": {"prompt": "When?"},
    "text": {"text": "At nine."},
}


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON-lines (text as it is) and give the path as a spec."""

    def write_file(*rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def one(write):
    """The single record of a single row."""

    def load_one(row, options: str = "", **settings) -> Record:
        [record] = load_records(write(row) + options, **settings).records
        return record

    return load_one


@pytest.mark.parametrize("name", GOOD)
def test_auto_recognises_every_format_and_says_so(write, name):
    found = load_records(write(GOOD[name]))

    assert found.rows == 1
    assert any(f"format {name}, decided by" in note for note in found.notes)


def test_messages_are_cut_at_the_first_answer(one):
    turns = [{"role": "system", "content": "s"}, *ASKED, *ANSWERED, user("And?"), assistant("At five.")]

    record = one({"messages": turns})

    assert record.prompt == turns[:2]
    assert record.completion == turns[2:]


def test_a_greeting_before_the_question_stays_in_the_prompt(one):
    record = one({"messages": [assistant("Hello!"), *ASKED, *ANSWERED]})

    assert [turn["role"] for turn in record.prompt] == ["assistant", "user"]
    assert record.completion == ANSWERED


def test_null_content_with_tool_calls_and_text_parts_are_read(one):
    call = {"id": "c1", "type": "function", "function": {"name": "hours", "arguments": '{"day": 1}'}}
    parts = [{"type": "text", "text": "At "}, {"type": "text", "value": "nine."}]
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "9", "tool_call_id": "c1"},
        {"role": "assistant", "content": parts},
    ]

    record = one({"messages": turns, "tools": '[{"name": "hours", "parameters": {}}]'})

    assert record.completion[0]["content"] == ""
    assert record.completion[0]["tool_calls"][0]["function"] == {"name": "hours", "arguments": {"day": 1}}
    assert record.completion[2]["content"] == "At nine."
    assert record.tools == [{"type": "function", "function": {"name": "hours", "parameters": {}}}]


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"loss": False}, {"loss_weight": 0.0}])
def test_turns_can_be_excluded_from_training(one, flag):
    record = one({"messages": [*ASKED, {**ANSWERED[0], **flag}, user("And?"), assistant("At five.")]})

    assert [turn.get("train", True) for turn in record.completion if turn["role"] == "assistant"] == [False, True]


def test_reasoning_and_call_ids_survive(one):
    turns = [*ASKED, {**ANSWERED[0], "reasoning_content": "It is late."}]

    assert one({"messages": turns}).completion[0]["reasoning_content"] == "It is late."


def test_sharegpt_calls_and_observations_become_tool_turns(one):
    turns = [
        {"from": "system", "value": ""},
        {"from": "human", "value": "When?"},
        {"from": "function_call", "value": '{"name": "hours", "arguments": {}}'},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "At nine."},
    ]

    record = one({"conversations": turns})

    assert [turn["role"] for turn in record.prompt + record.completion] == ["user", "assistant", "tool", "assistant"]
    assert record.completion[0]["tool_calls"][0]["function"]["name"] == "hours"


def test_alpaca_joins_input_and_learns_history(one):
    row = {"instruction": "And?", "input": "Sunday", "output": "Closed.", "history": [["When?", "At nine."]]}

    record = one({**row, "system": "Be kind."})

    assert record.prompt == [{"role": "system", "content": "Be kind."}, *ASKED]
    assert record.completion == [*ANSWERED, user("And?\nSunday"), assistant("Closed.")]


@pytest.mark.parametrize("column", ["output", "response", "completion", "answer", "target"])
def test_alpaca_knows_the_synonyms_of_output(one, column):
    assert one({"instruction": "When?", column: "At nine."}).completion == ANSWERED


@pytest.mark.parametrize(
    ("row", "view"),
    [
        ({"instruction": "When?", "chosen": "At nine.", "rejected": "No."}, "preference"),
        ({"instruction": "When?", "output": "At nine.", "kto_tag": True}, "unpaired"),
        ({**GOOD["sharegpt"], "label": False}, "unpaired"),
        (
            {
                "conversations": GOOD["sharegpt"]["conversations"][:1],
                "chosen": {"from": "gpt", "value": "At nine."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            "preference",
        ),
    ],
)
def test_pairs_and_labels_inside_alpaca_and_sharegpt(one, row, view):
    record = one(row, view=view)

    assert record.prompt == ASKED
    assert (record.chosen or record.completion) == ANSWERED


def test_a_category_called_label_is_no_label(one):
    record = one({**GOOD["messages"], "label": "opening hours"}, view="demonstration")

    assert record.label is None


def test_an_implicit_prompt_is_split_by_turns_not_by_characters(one):
    start = [*ASKED, *ANSWERED, user("And?")]
    row = {"chosen": [*start, assistant("At five.")], "rejected": [*start, assistant("At four.")]}

    record = one(row)

    assert record.prompt == start
    assert record.chosen == [assistant("At five.")]
    assert record.rejected == [assistant("At four.")]


def test_a_system_turn_survives_the_split_of_a_pair():
    system = {"role": "system", "content": "s"}

    prompt, _, _ = split_pair([system, *ASKED, *ANSWERED], [system, *ASKED, assistant("No.")])

    assert prompt == [system, *ASKED]


def test_transcripts_keep_inline_role_words(one):
    text = "\n\nHuman: Say Human: twice\n\nAssistant: Human: Human:\n\nHuman: ok\n\nAssistant:{}"

    record = one({"chosen": text.format(" yes"), "rejected": text.format(" no")})

    assert [turn["content"] for turn in record.prompt] == ["Say Human: twice", "Human: Human:", "ok"]
    assert record.chosen == [assistant("yes")]


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("9 * 2\n#### 18", "18"),
        ("so\n#### 1,234,567", "1234567"),
        ("so\n#### -5", "-5"),
        ("so\n#### 1,5", "1,5"),
        ("blue", "blue"),
    ],
)
def test_question_answer_keeps_the_text_and_takes_the_final_value(one, answer, final):
    record = one({"question": "How many?", "answer": answer})

    assert record.completion == [assistant(answer)]
    assert record.answer == final


def test_ab_pairs_follow_the_verdict_and_ties_are_dropped(write):
    rows = [{**GOOD["pairs"], "label": label} for label in (1, 2, 0)]

    found = load_records(write(*rows))

    assert [record.chosen[0]["content"] for record in found.records] == ["At nine.", "No."]
    assert found.dropped == {"tie": 1}


def test_ties_can_be_kept_in_both_orders(write):
    found = load_records(write({**GOOD["pairs"], "label": 0}) + ":ties=both")

    assert [record.chosen[0]["content"] for record in found.records] == ["At nine.", "No."]


def test_several_judges_vote_and_no_majority_is_a_tie(write, tmp_path):
    def row(*verdicts):
        judged = {f"judge{n}": verdict for n, verdict in enumerate(verdicts)}
        return {"instruction": "When?", "input": "Sunday", "r1": "A", "r2": "B", **judged}

    write(row(1, 1, 2), row(2, 2, 2), row(0, 1, 2), name="judged.jsonl")
    columns = "columns: {a: r1, b: r2, label: [judge0, judge1, judge2]}"
    recipe = f"source: judged.jsonl\nformat: pairs\n{columns}\nlabel_map: {{0: tie, 1: a, 2: b}}\n"
    (tmp_path / "judged.yaml").write_text(recipe)

    found = load_records(str(tmp_path / "judged.yaml"))

    assert [record.chosen[0]["content"] for record in found.records] == ["A", "B"]
    assert found.records[0].prompt == [user("When?\nSunday")]
    assert found.dropped == {"tie": 1}


def test_votes_leave_out_what_teaches_nothing_without_an_error(write, tmp_path):
    vote = GOOD["votes"] | {"models": {"a": "x@v1", "b": "y@v2"}}
    votes = [vote, {**vote, "choice": "b"}, {**vote, "choice": "tie"}, {**vote, "choice": "bad"}]
    votes += [{**vote, "b": vote["a"]}, {**vote, "b": [assistant(" ")]}]
    write(*votes[:3], name="registry/votes/1.jsonl")
    write(*votes[3:], name="registry/votes/2.jsonl")

    found = load_records("votes", view="preference", roots={"registry": tmp_path / "registry"})

    assert [record.chosen[0]["content"] for record in found.records] == ["At nine.", "No."]
    assert found.dropped == {"tie": 1, "vote: both bad": 1, "vote: equal answers": 1, "vote: empty answer": 1}
    assert found.records[0].meta["models"] == {"a": "x@v1", "b": "y@v2"}


def test_no_votes_yet_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="vote on the comparison page first"):
        load_records("votes", roots={"registry": tmp_path})
    with pytest.raises(DataError, match="needs a registry; give --registry"):
        load_records("votes")


def talk(*turns):
    return {"messages": list(turns)}


BAD_ROWS = {
    "missing column": ("prompt_completion", {"prompt": "q", "completio": "a"}, "did you mean completio"),
    "null field": ("prompt_completion", {"prompt": "q", "completion": None}, "completion: "),
    "not text": ("alpaca", {"instruction": "q", "output": 5}, "output: is a number, not text"),
    "empty prompt": ("alpaca", {"instruction": " ", "input": "", "output": "a"}, "instruction: is empty"),
    "empty completion": ("alpaca", {"instruction": "q", "output": "\n"}, "output: is empty"),
    "chosen equals rejected": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": " a\n"},
        "chosen: equals rejected",
    ),
    "unknown role": ("messages", talk(*ASKED, {"role": "asistant", "content": "a"}), "did you mean assistant?"),
    "message without role": ("messages", talk(*ASKED, {"content": "a"}), "messages[1]: has no 'role'"),
    "message without content": ("messages", talk(*ASKED, {"role": "assistant"}), "messages[1]: has no 'content'"),
    "no messages": ("messages", talk(), "messages: is an empty list"),
    "not messages": ("messages", {"messages": 5}, "messages: is a number, not a list"),
    "not a message": ("messages", talk("hello"), "messages[0]: is text, not a message"),
    "no assistant turn": ("messages", talk(*ASKED), "has no assistant turn"),
    "last turn is not the assistant's": ("messages", talk(*ASKED, *ANSWERED, user("x")), "ends with a user turn"),
    "part is not text": (
        "messages",
        talk({"role": "user", "content": [{"type": "image_url"}]}, *ANSWERED),
        "of type image_url",
    ),
    "bad tool call": ("messages", talk(*ASKED, {**ANSWERED[0], "tool_calls": [{"x": 1}]}), "tool call"),
    "prompt answered": ("prompt", {"prompt": [*ASKED, *ANSWERED]}, "ends with an assistant turn"),
    "prompts differ": (
        "preference",
        {"chosen": [*ASKED, *ANSWERED], "rejected": [user("Other?"), *ANSWERED]},
        "differ in a user turn",
    ),
    "answers part early": (
        "preference",
        {
            "chosen": [*ASKED, *ANSWERED, user("And?"), assistant("b")],
            "rejected": [*ASKED, assistant("No."), user("And?"), assistant("c")],
        },
        "chosen: goes on with a user turn",
    ),
    "bad label": ("unpaired", {"prompt": "q", "completion": "a", "label": "perhaps"}, "neither true nor false"),
    "not a finite number": ("alpaca", {"instruction": "q", "output": "a", "score": float("nan")}, "score: is nan"),
    "not a transcript": ("hh", {"chosen": "hello", "rejected": "hello"}, "does not start with a Human: turn"),
    "bad history": ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "history[0]"),
    "bad tools": ("messages", {**GOOD["messages"], "tools": "[oops"}, "tools: is no valid JSON"),
    "mixed rows": ("sharegpt", {**GOOD["sharegpt"], "label": True}, "an unpaired row among demonstration rows"),
    "invalid JSON": ("text", '{"text": "cut of', "is not valid JSON"),
    "not a row": ("alpaca", "[1, 2]", "is a list, not an object"),
    "empty text": ("text", {"text": " "}, "text: is empty"),
}
SURROGATE = {"text": "a\ud800"}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_or_left_out_and_counted(write, reason):
    format_name, bad, message = BAD_ROWS[reason]
    path = write(GOOD[format_name], bad, GOOD[format_name])
    spec = f"{path}:format={format_name}"

    with pytest.raises(DataError) as refused:
        load_records(spec)
    skipped = load_records(spec, on_bad_row="skip")

    assert f"{path}:2 " in str(refused.value)
    assert message in str(refused.value)
    assert "1 of 3 rows cannot be used" in str(refused.value)
    assert f"total {reason}: 1" in str(refused.value)
    assert skipped.rows == 2
    assert skipped.dropped == {reason: 1}


def test_lone_surrogates_and_nul_are_refused(write):
    rows = [GOOD["text"], json.dumps(SURROGATE), json.dumps({"text": "a\x00"})]

    assert load_records(write(*rows), on_bad_row="skip").dropped == {"not text": 2}


def test_equal_errors_are_one_line_with_their_number(write):
    rows = [GOOD["alpaca"], *[{"instruction": "q", "output": ""}] * 30]

    with pytest.raises(DataError) as refused:
        load_records(write(*rows))

    assert str(refused.value).count("output: is empty") == 1
    assert ":2 output: is empty; fill it in or remove the row (and 29 more rows like it)" in str(refused.value)
    assert "total empty completion: 30" in str(refused.value)
    assert "... and" not in str(refused.value)


def test_equal_errors_in_other_turns_of_a_conversation_are_one_line(write):
    talks = [talk(*[user("q"), assistant("a")] * count, {"role": "nurse", "content": "x"}) for count in (1, 2, 3)]

    with pytest.raises(DataError) as refused:
        load_records(write(*talks))

    assert str(refused.value).count("unknown role 'nurse'") == 1
    assert "(and 2 more rows like it)" in str(refused.value)


def test_twenty_different_bad_rows_are_shown_and_the_rest_counted(write):
    rows = [{**GOOD["unpaired"], "label": f"l{number}"} for number in range(30)]

    with pytest.raises(DataError) as refused:
        load_records(write(GOOD["unpaired"], *rows))

    assert str(refused.value).count("neither true nor false") == 20
    assert "... and 10 more" in str(refused.value)


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_an_empty_file_is_an_error(write, text):
    with pytest.raises(DataError, match="0 rows"):
        load_records(write(text, name="empty.json"))


def test_data_without_a_usable_row_tells_the_reasons(write):
    with pytest.raises(DataError, match=r"0 of 1 rows can be used \(empty completion: 1\)"):
        load_records(write({"instruction": "q", "output": ""}), on_bad_row="skip")


def test_columns_that_tell_no_format_are_named(write):
    with pytest.raises(DataError, match="cannot be recognised from the columns flags, utterance"):
        load_records(write({"flags": "B", "utterance": "hi"}))


VIEWS = {
    ("preference", "demonstration"): [{"completion": ANSWERED}],
    ("preference", "unpaired"): [
        {"completion": ANSWERED, "label": True},
        {"completion": [assistant("No.")], "label": False},
    ],
    ("preference", "prompt"): [{}],
    ("unpaired", "demonstration"): [{"completion": ANSWERED}],
    ("unpaired", "prompt"): [{}],
    ("messages", "prompt"): [{}],
    ("messages", "text"): [{"completion": ANSWERED}],
    ("qa", "prompt"): [{"answer": "At nine."}],
}


@pytest.mark.parametrize(("format_name", "view"), VIEWS)
def test_records_serve_other_views(write, format_name, view):
    found = load_records(write(GOOD[format_name]), view=view).records

    expected = [Record(prompt=ASKED, **fields) for fields in VIEWS[format_name, view]]
    for record in found:
        record.source, record.line = "", None
    assert found == expected


@pytest.mark.parametrize(
    ("format_name", "view", "needs"),
    [
        ("messages", "preference", "chosen and rejected"),
        ("messages", "unpaired", "completion with label"),
        ("text", "demonstration", "completion or chosen"),
        ("prompt", "demonstration", "completion or chosen"),
        ("preference", "text", "needs text"),
    ],
)
def test_a_view_the_data_cannot_give_names_dataset_view_and_field(write, format_name, view, needs):
    with pytest.raises(DataError) as refused:
        load_records(write(GOOD[format_name]), view=view)

    assert all(part in str(refused.value) for part in ("rows.jsonl", view, needs))


def test_answers_labelled_bad_are_no_demonstrations(write):
    rows = [GOOD["unpaired"], {**GOOD["unpaired"], "label": False}]

    found = load_records(write(*rows), view="demonstration")

    assert found.rows == 1
    assert found.dropped == {"labelled bad": 1}


def test_a_conversation_that_ends_with_the_user_is_a_prompt(one):
    turns = [*ASKED, *ANSWERED, user("And?")]

    assert one({"messages": turns}, view="prompt").prompt == turns


def test_an_unknown_view_is_a_usage_error(write):
    with pytest.raises(UsageError, match="did you mean preference"):
        load_records(write(GOOD["text"]), view="preferences")


def test_the_digest_is_of_content_and_order_not_of_place(write):
    rows = [GOOD["alpaca"], {"instruction": "And?", "output": "At five."}]
    first = load_records(write(*rows)).digest

    assert load_records(write(*rows, name="other.jsonl")).digest == first
    assert load_records(write(rows[0], "", rows[1])).digest == first
    assert load_records(write(*reversed(rows))).digest != first
    assert first.startswith("sha256:")


def test_describe_is_what_a_manifest_keeps(write):
    found = load_records(write(GOOD["alpaca"], {"instruction": "q", "output": ""}), on_bad_row="skip")

    assert found.describe() == {
        "name": "rows.jsonl",
        "digest": found.digest,
        "rows": 1,
        "dropped": {"empty completion": 1},
    }


def test_repeated_rows_and_unused_columns_are_noted(write):
    row = {**GOOD["alpaca"], "systm": "s", "topic": "hours"}

    notes = " ".join(load_records(write(row, row)).notes)

    assert "1 rows repeat an earlier row" in notes
    assert "columns kept as meta: systm, topic; did you mean system by systm?" in notes


def test_limit_takes_the_first_and_with_a_seed_a_sample(write):
    rows = [{"instruction": f"q{n}", "output": "a"} for n in range(50)]
    path = write(*rows)

    def asked(spec: str) -> list[str]:
        return [record.prompt[0]["content"] for record in load_records(spec).records]

    assert asked(f"{path}:limit=3") == ["q0", "q1", "q2"]
    assert asked(f"{path}:limit=3:seed=1") == asked(f"{path}:limit=3:seed=1") != ["q0", "q1", "q2"]
    assert sorted(asked(f"{path}:seed=1")) == sorted(asked(path))


def test_several_specs_are_read_one_after_the_other(write):
    specs = [write(GOOD["alpaca"], name="a.jsonl"), write(GOOD["qa"], name="b.jsonl")]

    found = load_records(specs, view="demonstration")

    assert found.name == "a.jsonl+b.jsonl"
    assert found.rows == 2


def test_records_know_their_file_and_line(write):
    path = write(GOOD["alpaca"], "", GOOD["alpaca"])

    assert [record.where for record in load_records(path).records] == [f"{path}:1", f"{path}:3"]


def test_unpaired_labels_may_be_numbers_or_words(write):
    rows = [{**GOOD["unpaired"], "label": label} for label in (1, 0, "true", "False")]

    assert [record.label for record in load_records(write(*rows)).records] == [True, False, True, False]


def test_a_scan_collects_bad_rows_without_raising(write):
    bad = []
    path = write(GOOD["alpaca"], {"instruction": "q", "output": ""})
    records = list(open_scan(path, on_bad_row="collect", on_bad=bad.append).records())

    assert [row.error.reason for row in bad] == ["empty completion"]
    assert len(records) == 1


def test_compressed_rows_equal_plain_ones(write, tmp_path):
    plain = load_records(write(*[GOOD["hh"]] * 3))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))

    assert load_records(str(packed)).digest == plain.digest


@pytest.mark.parametrize("good", [True, 1, 1.0, "1.0", "True", "TRUE", " true ", "1", "yes", "Yes"])
@pytest.mark.parametrize("bad", [False, 0, 0.0, "0.0", "False", "no"])
def test_labels_in_the_spellings_of_tables_are_read(good, bad):
    assert (read_label(good, "label"), read_label(bad, "label")) == (True, False)


@pytest.mark.parametrize("value", [float("nan"), "nan", None, "", 0.5, 2, -1, "good", [True], float("inf")])
def test_what_is_no_label_is_refused(value):
    with pytest.raises(RowError, match="bad label"):
        read_label(value, "label")


def test_a_label_map_knows_whole_numbers_that_a_table_wrote_with_a_point():
    assert read_label(2.0, "stars", {"2": True, "1": False}) is True


def test_numeric_labels_of_conversations_count_where_labels_are_asked_for(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [json.dumps({"messages": talk, "label": label}) for label in (1.0, 0.0)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    found = load_records(str(tmp_path / "a.jsonl"), view="unpaired")

    assert [record.label for record in found.records] == [True, False]


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "four", "reasoning_content": "two and two"},
        {"content": "four", "reasoning": "two and two"},
        {"content": "four", "thinking": "two and two"},
        {"content": "four", "thinking": "two and two", "reasoning": "two and two"},
        {"content": [{"type": "reasoning", "text": "two and two"}, {"type": "text", "text": "four"}]},
        {"content": [{"type": "thinking", "thinking": "two and two"}, {"type": "text", "text": "four"}]},
    ],
)
def test_reasoning_is_one_field_under_whichever_key_or_part_a_file_holds_it(turn):
    from align.data.formats.turns import OPENAI_TAGS, read_turns

    [message] = read_turns([{"role": "assistant", **turn}], "messages", OPENAI_TAGS)

    assert message == {"role": "assistant", "content": "four", "reasoning_content": "two and two"}


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"content": "four", "thinking": "one", "reasoning": "two"}, "two different reasonings"),
        ({"content": "four", "reasoning": {"effort": "high"}}, "is an object, not text"),
    ],
)
def test_reasoning_that_is_no_text_or_twice_different_is_a_bad_row(turn, problem):
    from align.data.formats.turns import OPENAI_TAGS, read_turns
    from align.data.row_errors import RowError

    with pytest.raises(RowError, match=problem):
        read_turns([{"role": "assistant", **turn}], "messages", OPENAI_TAGS)
