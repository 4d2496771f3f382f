from __future__ import annotations

import json

import pytest

from align.data import load_records
from align.data.record_sets import Findings, find_problems, refuse_leak
from align.errors import DataError
from align.schema import Record, assistant, user


def demo(question, answer, line=1, **extra):
    return Record(prompt=[user(question)], completion=[assistant(answer)], source="a.jsonl", line=line, **extra)


def pair(question, chosen, rejected, line=1, **extra):
    answers = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return Record(prompt=[user(question)], source="p.jsonl", line=line, **answers, **extra)


def test_a_sound_set_has_no_problems():
    assert find_problems(demo(f"q{n}", f"a{n}", n, id=str(n)) for n in range(9)) == []
    assert find_problems([]) == []


def test_exact_repeats_are_counted_with_the_first_place():
    rows = [demo("q", "a", 1), demo("q", "b", 2), demo("q", "a", 3), demo("q", "a", 4)]

    assert find_problems(rows) == ["2 rows repeat an earlier row exactly (first a.jsonl:3)"]
    assert Findings().sentences() == []


def test_repeated_texts_are_found_too():
    rows = [Record(text=text, source="t.txt", line=n) for n, text in enumerate(["x", "y", "x"], start=1)]

    assert find_problems(rows) == ["1 rows repeat an earlier row exactly (first t.txt:3)"]


def test_weights_of_rows_are_told_as_what_training_does_not_heed():
    (lines,) = find_problems([demo("q", "a", 1, weight=1.0), demo("r", "b", 2, weight=0.5), demo("s", "c", 3)])

    assert lines.startswith("1 rows have a weight (first a.jsonl:2); every row counts once")


def test_an_id_used_twice_is_told_unless_one_row_made_both_records():
    lines = find_problems([demo("q", "a", 1, id="7"), demo("r", "b", 2, id="7")])
    both_orders = [pair("q", "one", "two", 5, id="7"), pair("q", "two", "one", 5, id="7")]

    assert lines == ["1 rows have the id of an earlier, other row (first a.jsonl:2)"]
    assert not any("id of an earlier" in line for line in find_problems(both_orders))


def test_contradictory_pairs_are_told_but_not_a_tie_kept_in_both_orders():
    lines = find_problems([pair("q", "one", "two", 1), pair("r", "one", "two", 2), pair("q", "two", "one", 3)])
    tie = find_problems([pair("q", "one", "two", 1), pair("q", "two", "one", 1)])

    assert any("1 rows contradict an earlier row" in line and "first p.jsonl:3" in line for line in lines)
    assert any("1 pairs share their prompt with an earlier pair; there are 2 prompts" in line for line in lines)
    assert not any("contradict" in line for line in tie)


def test_an_answer_labelled_good_and_bad_contradicts_itself():
    rows = [demo("q", "a", 1, label=True), demo("q", "a", 2, label=False)]

    assert any("1 rows contradict an earlier row" in line for line in find_problems(rows))


def test_pairs_that_differ_in_form_alone_are_told():
    lines = find_problems(
        [pair("q", "At nine.", "at  NINE.", 1), pair("r", "Ａ", "a", 2), pair("s", "at nine", "at ten", 3)]
    )

    assert any("2 pairs differ in case, spacing or Unicode form alone (first p.jsonl:1)" in line for line in lines)


@pytest.mark.parametrize(
    ("longer", "shorter", "word"),
    [(80, 20, "longer"), (20, 80, "shorter"), (55, 45, None), (690, 310, None), (4, 0, None), (8, 2, None)],
)
def test_length_bias_is_told_when_it_is_large_and_no_accident(longer, shorter, word):
    rows = [pair(f"q{n}", "x" * 20, "y" * 10, n) for n in range(longer)]
    rows += [pair(f"r{n}", "x" * 10, "y" * 20, n) for n in range(shorter)]

    found = [line for line in find_problems(rows) if "length may be learned" in line]

    assert len(found) == (word is not None)
    assert not word or f"chosen is {word} in 80 of 100 pairs of unequal length (80%)" in found[0]


@pytest.mark.parametrize(("good", "bad", "lines"), [(10, 10, False), (30, 10, False), (31, 10, True), (5, 0, True)])
def test_unbalanced_labels_are_told(good, bad, lines):
    rows = [demo(f"q{n}", "a", n, label=n < good) for n in range(good + bad)]

    assert any(f"labels are unbalanced: {good} good, {bad} bad" in line for line in find_problems(rows)) is lines


def test_template_variables_are_named():
    lines = find_problems(
        [demo("Who are you?", "I am {{name}} by {{ author }}.", 3), demo("x", "a {single} {{ 1 + 1 }}", 4)]
    )

    [line] = lines
    assert line.startswith("1 rows hold template variables such as {{name}}, {{ author }} (first a.jsonl:3)")


def test_lost_characters_and_mojibake_are_told_with_their_share():
    rows = [
        demo("caf\ufffd", "x", 1),
        demo("cafÃ©", "itâ€™s", 2),
        demo("café, Ärger, naïve", "中文 “ja”", 3),
        demo("q", "a", 4),
    ]

    lines = find_problems(rows)

    assert lines == [
        "1 rows (25.0%) hold U+FFFD, a character lost in decoding (first a.jsonl:1)",
        "1 rows (25.0%) hold mojibake (first a.jsonl:2)",
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_loading_appends_the_problems(tmp_path):
    spec = write(tmp_path / "a.jsonl", [{"instruction": "q", "output": "{{name}}"}] * 2)

    notes = load_records(spec).notes

    assert any("1 rows repeat an earlier row exactly" in note for note in notes)
    assert any("{{name}}" in note for note in notes)


def test_a_leak_is_refused_with_number_and_places(tmp_path):
    rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(10)]
    train = load_records(write(tmp_path / "train.jsonl", rows[:8]))
    held_out = load_records(write(tmp_path / "eval.jsonl", rows[6:]))

    with pytest.raises(DataError) as refused:
        refuse_leak(train, held_out)

    message = str(refused.value)
    assert message.startswith("eval.jsonl: 2 of its 4 rows are in train.jsonl too")
    assert f"{tmp_path}/eval.jsonl:1 is {tmp_path}/train.jsonl:7" in message
    assert "align data split" in message


def test_rows_that_share_only_the_prompt_or_the_answer_are_no_leak(tmp_path):
    train = load_records(write(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a"}]))
    held_out = load_records(
        write(tmp_path / "b.jsonl", [{"instruction": "q", "output": "b"}, {"instruction": "r", "output": "a"}])
    )

    refuse_leak(train, held_out)

    assert (train.rows, held_out.rows) == (1, 2)


def test_a_pair_with_the_verdict_turned_round_is_a_leak_too(tmp_path):
    train = load_records(write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}]))
    held_out = load_records(write(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "y", "rejected": "x"}]))

    with pytest.raises(DataError, match=r"1 of its 1 rows are in a.jsonl too"):
        refuse_leak(train, held_out)


def test_documents_and_prompts_leak_as_well(tmp_path):
    texts = load_records(write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}]))
    more = load_records(write(tmp_path / "b.jsonl", [{"text": "three"}, {"text": "two"}]))
    asks = load_records(write(tmp_path / "c.jsonl", [{"prompt": "q"}]))

    with pytest.raises(DataError, match=r"b.jsonl: 1 of its 2 rows"):
        refuse_leak(texts, more)
    with pytest.raises(DataError, match=r"c.jsonl: 1 of its 1 rows"):
        refuse_leak(asks, asks)


def test_real_sets_give_the_findings_they_are_known_for(real_data):
    identity = load_records(str(real_data / "sft/llamafactory_demo__identity.json")).notes
    pandalm = load_records(str(real_data / "pref/llamafactory_demo__dpo_zh_demo.json"), on_bad_row="skip").notes

    assert any("85 rows hold template variables" in note for note in identity)
    assert any("hold U+FFFD" in note for note in pandalm)
