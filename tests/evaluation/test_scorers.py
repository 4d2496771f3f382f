"""Scorers of the field's sets: what counts as right, worked by hand, and what nonsense counts as."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.strategies import text

from align.data import load_records
from align.errors import DataError, UsageError
from align.evaluation.scorers import Likelihood, scorer, scorer_named, scorer_names
from align.evaluation.scorers.matches import longest_common_run
from align.schema import Record, user

NONSENSE = {
    "nothing": "",
    "white space": " \n\t ",
    "signs": "*** ??? ###",
    "an open mark": "#### ",
    "marks alone": "####" * 1000,
    "other digits": "#### １８ ١٨ 十八",
    "a million digits": "1" * 1_000_000,
    "a million words": "word " * 200_000,
    "brackets": "[({<<" * 50_000,
    "control characters": "\x00\x1b[2J\u202e\ufeff",
    "half an emoji": "\ud83d",
}


def right(name: str, answer: str, completion: str, **meta) -> bool:
    values = scorer_named(name)(Record(prompt=[user("?")], answer=answer, meta=meta), completion)
    return bool(values["correct"])


def test_a_scorer_is_found_by_name_and_an_unknown_one_hints_at_the_nearest():
    assert {"bbh", "cmrc", "gsm8k", "ifeval", "label_choice", "squad", "truthfulqa"} <= set(scorer_names())
    with pytest.raises(UsageError, match=r"scorer: asked for 'gsm8'; no scorer has that name; did you mean gsm8k\?"):
        scorer_named("gsm8")


def test_a_name_is_registered_once():
    def gsm8k(record, completion):
        return {}

    with pytest.raises(UsageError, match=r"gsm8k: already registered by align\.evaluation\.scorers\.matches"):
        scorer(gsm8k)


def test_a_record_without_what_a_scorer_needs_is_told_before_anything_is_sampled():
    bare = Record(prompt=[user("?")], source="rows.jsonl", line=3)

    with pytest.raises(DataError, match=r"scorer ifeval: needs meta.instruction_id_list; rows.jsonl:3 has none"):
        scorer_named("ifeval").check([bare])
    with pytest.raises(DataError, match=r"scorer gsm8k: needs answer; rows.jsonl:3"):
        scorer_named("gsm8k").check([bare])


@pytest.mark.parametrize(
    ("answer", "completion", "good"),
    [
        ("18", "She makes 9 * 2 = $18 every day.\n#### 18", True),
        ("18", "#### $18.00 a day, for 9 * 2", True),
        ("18", "#### 9\nNo, wait.\n#### 18", False),
        ("9", "#### 9\nNo, wait.\n#### 18", True),
        ("18", "#### Step 1: count\n9 * 2\n#### Answer\n#### 18", True),
        ("18", "So it is 18. I am sure of it.", True),
        ("18", "It is 18, not 17", False),
        ("1200", "#### 1,200", True),
        ("1200", "That makes 1,200 eggs.", True),
        ("1200", "#### 1,20", False),
        ("1200", "#### 1.200", False),
        ("-3", "#### -3", True),
        ("-3", "The balance is −3.", True),
        ("-3", "#### 3", False),
        ("3", "#### 7 - 3", False),
        ("18", "#### eighteen, 18", True),
        ("18", "#### eighteen\n18", False),
        ("0.5", "#### .5", True),
    ],
)
def test_gsm8k_reads_the_number_behind_the_mark_or_else_the_last(answer, completion, good):
    assert right("gsm8k", answer, completion) is good


@pytest.mark.parametrize(
    ("target", "completion", "good"),
    [
        ("(B)", "So the answer is (B).", True),
        ("(B)", "The answer is **B**, because (A) is wrong.", True),
        ("(B)", "(A) is wrong. (B)", True),
        ("(B)", "(A), not (B)... the answer is (A)", False),
        ("(A)", "The answer is a mystery", False),
        ("(A)", "A good question. B", False),
        ("True", "not False is True\nSo the answer is True.", True),
        ("True", "true", True),
        ("False", "The answer is True, not False.", False),
        ("yes", "The answer is: Yes, it is plausible.", True),
        ("no", "Yes", False),
        ("8", "3 and 5 make 8", True),
        ("8", "The answer is 8 because 3 + 5 is 8, not 9", True),
        ("8", "The answer is 18", False),
        ("-3", "the answer is −3", True),
        ("> ) ]", "So the answer is > ] ).", False),
        ("> ) ]", "So the answer is > ) ].", True),
        ("apple pear", 'The answer is "Apple pear".', True),
        ("valid", "The argument is deductively valid.", True),
        ("", "", False),
    ],
)
def test_bbh_reads_what_a_completion_comes_to(target, completion, good):
    assert right("bbh", target, completion) is good


def scores(name: str, completion: str, *references: str) -> dict[str, float]:
    record = Record(prompt=[user("?")], answer=references[0], meta={"answers": list(references)})
    return scorer_named(name)(record, completion)


def test_squad_takes_the_best_reference():
    # "the Big-Red kettle!" is bigred kettle; of two words two are shared with "bigred kettle", one with "red kettle"
    assert scores("squad", "the Big-Red kettle!", "red kettle", "bigred kettle") == {"exact": 1.0, "f1": 1.0}
    assert scores("squad", "the Big-Red kettle!", "red kettle") == {"exact": 0.0, "f1": 0.5}
    # one of three words, one of one word: precision 1/3, recall 1
    assert scores("squad", "at nine sharp", "nine")["f1"] == pytest.approx(0.5)
    assert scores("squad", "nine nine", "nine")["f1"] == pytest.approx(2 / 3)
    assert scores("squad", "the", "a") == {"exact": 1.0, "f1": 0.0}


def test_cmrc_counts_the_longest_run_of_characters():
    # three of four characters in one run: precision 3/4, recall 3/3
    assert scores("cmrc", "在九点半", "九点半") == {"exact": 0.0, "f1": pytest.approx(6 / 7)}
    # both of two characters are there, but never side by side: a run of one
    assert scores("cmrc", "半点", "点半") == {"exact": 0.0, "f1": pytest.approx(0.5)}
    assert scores("cmrc", "《九点》，", "八点", "九点") == {"exact": 1.0, "f1": 1.0}
    assert scores("cmrc", "ω-force", "光荣和ω-Force")["f1"] == pytest.approx(2 / 5)
    assert longest_common_run(list("abcde"), list("xbcdy")) == 3


def test_truthfulqa_worked_by_hand():
    record = Record(
        prompt=[user("?")],
        meta={
            "mc1_targets": {"best": 1, "false": 0},
            "mc2_targets": {"choices": ["best", "good", "false"], "labels": [1, 1, 0]},
        },
    )
    known = scorer_named("truthfulqa")
    assert known.options(record) == ["best", "false", "good"]

    def score(best: float, false: float, good: float) -> dict[str, float]:
        return known(record, [Likelihood(value, 2) for value in (best, false, good)])

    # masses 0.5, 0.25 and 0.25
    assert score(math.log(0.5), math.log(0.25), math.log(0.25)) == {"mc1": 1.0, "mc2": pytest.approx(0.75)}
    assert score(-1001.0, -1000.0, -1000.0)["mc1"] == 0.0
    assert score(-1000.0, -1000.0, -1000.0) == {"mc1": 0.0, "mc2": pytest.approx(2 / 3)}
    assert score(math.nan, -1.0, -1.0) == {"mc1": 0.0, "mc2": 0.0}
    assert score(-math.inf, -math.inf, -math.inf) == {"mc1": 0.0, "mc2": 0.0}


@pytest.mark.parametrize("targets", [{}, [], {"only": 1}, {"choices": ["a", "b"], "labels": [0, 0]}, {3: 1, 4: 0}])
def test_truthfulqa_without_true_and_false_answers_is_told(targets):
    record = Record(prompt=[user("?")], meta={"mc1_targets": targets, "mc2_targets": targets}, source="a.json", line=2)

    with pytest.raises(DataError, match=r"mc1_targets of a.json:2 has not both true and false answers"):
        scorer_named("truthfulqa").options(record)


def test_a_label_is_chosen_by_likelihood():
    known = scorer_named("label_choice")
    letter = Record(answer="(B)", meta={"labels": ["A", "B", "C"]})
    name = Record(answer="positive", meta={"labels": ["negative", "positive"]})

    assert known.options(letter) == ["A", "B", "C"]
    found = known(letter, [Likelihood(math.log(share), 1) for share in (0.2, 0.5, 0.3)])
    assert found == {"accuracy": 1.0, "probability": pytest.approx(0.5)}
    assert known(name, [Likelihood(-1.0, 1), Likelihood(-1.0, 1)])["accuracy"] == 0.0
    assert known(name, [Likelihood(math.nan, 1), Likelihood(math.nan, 1)]) == {"accuracy": 0.0, "probability": 0.0}
    with pytest.raises(DataError, match=r"the answer 'Z' of .* is none of its labels \['A', 'B'\]"):
        known.options(Record(answer="Z", meta={"labels": ["A", "B"]}))


INSTRUCTIONS = {
    "instruction_id_list": ["detectable_format:title", "length_constraints:number_sentences", "keywords:existence"],
    "kwargs": [{}, {"num_sentences": 2, "relation": "less than"}, {"keywords": ["("]}],
}


@settings(max_examples=150)
@given(text(), text(min_size=1))
def test_whatever_a_model_says_every_number_is_a_share(completion, answer):
    record = Record(prompt=[user("?")], answer=answer, meta={"answers": [answer, "nine"], **INSTRUCTIONS})

    for name in ("bbh", "cmrc", "gsm8k", "ifeval", "squad"):
        values = scorer_named(name)(record, completion)
        assert all(0 <= value <= 1 for key, value in values.items() if key != "instructions"), name


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_wrong_and_quickly_so(kind):
    asked = {
        "gsm8k": Record(answer="18"),
        "bbh": Record(answer="(B)"),
        "squad": Record(answer="nine", meta={"answers": ["nine", "at nine"]}),
        "cmrc": Record(answer="九点", meta={"answers": ["九点", "上午九点"]}),
    }
    start = time.thread_time()

    for name, record in asked.items():
        values = scorer_named(name)(record, NONSENSE[kind])
        assert values.get("correct", values.get("f1")) == 0, name

    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    "task", ["boolean_expressions", "date_understanding", "navigate", "object_counting", "sports_understanding"]
)
def test_every_target_of_bbh_is_found_in_an_answer_that_names_it(real_data: Path, task: str):
    records = load_records(f"bbh:source={real_data}/verifiable/bbh_{task}.json").records

    for said in ("{}", "Let us see.\nSo the answer is {}.", "**{}**", "The answer is: {} and nothing else"):
        assert all(right("bbh", str(record.answer), said.format(record.answer)) for record in records)


def test_gsm8k_agrees_with_the_published_verdicts_on_four_models(real_data: Path):
    records = load_records(f"{real_data}/verifiable/gsm8k_model_solutions.jsonl").records

    judged = [right("gsm8k", str(record.answer), record.completion[0]["content"]) for record in records]

    assert len(judged) == 2632
    assert judged == [record.label for record in records]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("xquad:source={}/eval/xquad__xquad.en.json", "squad"),
        ("cmrc2018:source={}/eval/cmrc2018__cmrc2018_dev.json", "cmrc"),
    ],
)
def test_the_reference_answers_themselves_are_right(real_data: Path, spec: str, name: str):
    records = load_records(spec.format(real_data)).records[:500]

    found = [scorer_named(name)(record, str(record.answer)) for record in records]

    assert all(values == {"exact": 1.0, "f1": 1.0} for values in found)
