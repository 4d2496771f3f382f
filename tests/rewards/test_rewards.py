"""Rewards as a user names them in YAML."""

import json
from fractions import Fraction

import numpy
import pytest

from align.config import build
from align.data import load_records
from align.errors import DataError, UsageError
from align.ppo import PpoConfig
from align.rewards import find_reward, reward, reward_names
from align.rewards.built_in import last_number
from align.rewards.weighted_rewards import RewardSettings, WeightedRewards
from align.rl.gold import GoldRewards
from align.schema import Record, user
from align.world.desk_write import DeskSizes, write_desk


def score(name, completion, answer="42", weight=1.0, **args):
    rewards = WeightedRewards([RewardSettings(name=name, weight=weight, args=args)])
    return rewards.total(rewards.score_all([Record(answer=answer)], [completion])[0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("3 + 4 = 7 apples", "7"),
        ("#### 1,234,567", "1234567"),
        ("costs $1,234.50 in all", "1234.5"),
        ("It is -3", "-3"),
        ("It is −3 degrees", "-3"),
        ("-$5.25", "-5.25"),
        ("$-5.25", "-5.25"),
        ("\\$18", "18"),
        ("1{,}000", "1000"),
        ("about 12%", "12"),
        ("12 % of it", "12"),
        ("x = 7-3", "3"),
        ("f(2)-3", "3"),
        (".5", "0.5"),
        ("0.25", "0.25"),
        ("3/4", "3/4"),
        ("2.5e3", "2500"),
        ("1, 2", "2"),
        ("1,2", "2"),
        ("12,3456", "3456"),
        ("答案是42", "42"),
        ("共1,500元。", "1500"),
        ("007", "7"),
        ("1e999999999", "1"),
        ("an mp3 file", None),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number_reads_what_people_write(text, number):
    assert last_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("so she has 18 eggs", "Janet sells 16 - 3 - 4 = 9. 9 * 2 = 18\n#### 18", 1.0),
        ("so she has 17 eggs", "#### 18", 0.0),
        ("18.0", "18", 1.0),
        ("1,800", "1800", 1.0),
        ("-18", "18", 0.0),
        ("no idea", "18", 0.0),
        ("18", "eighteen", 0.0),
    ],
)
def test_numeric_match_compares_the_last_numbers(completion, answer, expected):
    assert score("numeric_match", completion, answer) == expected


@pytest.mark.parametrize(
    ("name", "completion", "args", "expected"),
    [
        ("exact_match", " 42\n", {}, 1.0),
        ("exact_match", "42!", {}, 0.0),
        ("numeric_match", "42.4", {"tolerance": 0.5}, 1.0),
        ("regex", "the <b>end</b>", {"pattern": "<b>.*</b>"}, 1.0),
        ("regex", "the <b>end</b>", {"pattern": "<b>.*</b>", "full": True}, 0.0),
        ("regex", " <b>end</b> ", {"pattern": "<b>.*</b>", "full": True}, 1.0),
        ("length", "one two three four", {"target": 4}, 1.0),
        ("length", "one two", {"target": 4}, 0.5),
        ("length", "", {"target": 4}, 0.0),
        ("length", "a b c d e f g h i j", {"target": 4}, 0.0),
        ("length", "你好", {"target": 4, "unit": "characters"}, 0.5),
        ("keyword", "Thank you, and sorry", {"words": ["thank", "SORRY", "please", "refund"]}, 0.5),
        ("keyword", "thank you", {"words": ["Thank"], "ignore_case": False}, 0.0),
        ("keyword", "No. Not a cat", {"scores": {"no": 1, "not": 0.5, "at": 8, "dog": 8}}, 1.5),
        ("keyword", " yes, yes", {"scores": {"yes": -2}}, -2.0),
        ("keyword", "w10", {"scores": {"w1": 1, "w10": 2}}, 2.0),
        ("keyword", "a b", {"scores": {"A": 1, "a": 2}, "ignore_case": False}, 2.0),
        ("keyword", "谢谢你。42", {"scores": {"谢谢": 1, 42: 2, "4": 8}}, 3.0),
        ("keyword", "C++ and :-)", {"scores": {"c++": 1, ":-)": 2, "c": 4}}, 7.0),
        ("keyword", "nothing", {"scores": {"yes": 1}}, 0.0),
    ],
)
def test_built_in_reward(name, completion, args, expected):
    assert score(name, completion, **args) == expected


def test_exact_match_can_ignore_case():
    assert score("exact_match", "YES", answer="yes") == 0.0
    assert score("exact_match", "YES", answer="yes", ignore_case=True) == 1.0


def test_rewards_add_up_by_weight():
    rewards = WeightedRewards(
        [
            RewardSettings(name="exact_match", weight=2.0),
            RewardSettings(name="length", weight=-0.5, args={"target": 2}),
        ]
    )

    values = rewards.score_all([Record(answer="42")], ["42"])[0]

    assert values == {"exact_match": 1.0, "length": 0.5}
    assert rewards.total(values) == 2.0 * 1.0 - 0.5 * 0.5


def test_an_unknown_reward_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"'numeric_macth'; no reward has that name; did you mean numeric_match"):
        find_reward("numeric_macth")


def test_a_wrong_argument_shows_the_signature():
    with pytest.raises(UsageError, match=r"unexpected keyword argument 'goal'.*target: 'Positive'"):
        WeightedRewards([RewardSettings(name="length", args={"target": 3, "goal": 3})])


def test_a_missing_argument_shows_the_signature():
    with pytest.raises(UsageError, match="missing a required argument: 'pattern'"):
        WeightedRewards([RewardSettings(name="regex")])


def test_unknown_keys_of_a_reward_are_refused():
    with pytest.raises(UsageError, match="wieght: unknown setting"):
        build(RewardSettings, {"name": "length", "wieght": 2})


def test_a_record_without_the_answer_is_named_before_anything_is_sampled():
    rewards = WeightedRewards([RewardSettings(name="numeric_match")])
    records = [Record(answer="1", source="a.jsonl", line=1), Record(source="a.jsonl", line=2)]

    with pytest.raises(DataError, match=r"numeric_match: needs the field answer; a\.jsonl:2 has none"):
        rewards.check(records)


def test_a_reward_of_ones_own_is_registered_by_the_decorator():
    @reward
    def shouting_in_this_test(record, completion):
        return sum(letter.isupper() for letter in completion) / max(1, len(completion))

    assert "shouting_in_this_test" in reward_names()
    assert score("shouting_in_this_test", "ABcd") == 0.5


def test_a_name_is_not_taken_twice():
    def exact_match(record, completion):
        return 0.0

    reward_names()

    with pytest.raises(UsageError, match="already registered"):
        reward(exact_match)


@reward
def plays_in_these_tests(record, completion):
    """Returns what a test put there, or raises it."""
    if isinstance(PLAYED[0], Exception):
        raise PLAYED[0]
    return PLAYED[0]


PLAYED = [0.0]
ROW = Record(source="a.jsonl", line=7)
WHERE = r"for the completion 'word word .*\.\.\. of a\.jsonl:7"


def play(value):
    PLAYED[:] = [value]
    rewards = WeightedRewards([RewardSettings(name="plays_in_these_tests")])
    return rewards.score_all([ROW], ["word " * 40])[0]["plays_in_these_tests"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "returned nan"),
        (float("-inf"), "returned -inf"),
        (10**400, r"returned 1000\d*\.\.\."),
        (1j, "returned 1j"),
        (None, "returned None"),
        ("3", "returned '3'"),
        ({"score": 1.0}, r"returned \{'score': 1.0\}"),
        ([1.0, 2.0], r"returned 2 values, \[1.0, 2.0\],"),
        ((), r"returned 0 values, \(\),"),
        (numpy.array([1.0, 2.0]), r"returned 2 values, array\(\[1., 2.\]\),"),
        (numpy.array([]), "returned 0 values, array.*,"),
    ],
)
def test_what_is_no_finite_number_names_reward_completion_and_record(value, told):
    with pytest.raises(DataError, match=f"reward plays_in_these_tests: {told} {WHERE}; expected one finite number"):
        play(value)


@pytest.mark.parametrize("error", [ValueError("bad\nrow"), KeyError("answer"), ZeroDivisionError(), UsageError("no")])
def test_a_reward_that_raises_names_itself_completion_and_record(error):
    told = rf"reward plays_in_these_tests: raised {type(error).__name__} {WHERE}: .*; correct the reward or the row"

    with pytest.raises(DataError, match=told) as caught:
        play(error)

    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_ctrl_c_inside_a_reward_is_still_ctrl_c():
    @reward
    def interrupted_in_this_test(record, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score("interrupted_in_this_test", "x")


@pytest.mark.parametrize(
    ("value", "number"),
    [(True, 1.0), (3, 3.0), (Fraction(1, 2), 0.5), (numpy.float32(0.5), 0.5), (numpy.array(2.0), 2.0),
     (numpy.array([2.0]), 2.0)],
)  # fmt: skip
def test_numbers_of_every_kind_are_taken(value, number):
    assert play(value) == number


def test_a_reward_named_twice_counts_twice():
    rewards = WeightedRewards(
        [
            RewardSettings(name="keyword", weight=2.0, args={"words": ["thanks"]}),
            RewardSettings(name="length", args={"target": 4}),
            RewardSettings(name="keyword", weight=-1.0, args={"words": ["refund", "sorry"]}),
        ]
    )

    values = rewards.score_all([Record()], ["Thanks, no refund"])[0]

    assert rewards.names == ["keyword", "length", "keyword-2"]
    assert values == {"keyword": 1.0, "length": 0.75, "keyword-2": 0.5}
    assert rewards.total(values) == 2.0 + 0.75 - 0.5


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("keyword", {"words": 5}, "rewards: keyword: words: should be a valid list, found 5; correct its args"),
        (
            "keyword",
            {"words": [1, 2]},
            r"rewards: keyword: words\[0\]: should be a valid string, found 1; correct",
        ),
        ("length", {"target": "abc"}, "rewards: length: target: should be a valid integer, .*, found 'abc'"),
        ("length", {"target": None}, "rewards: length: target: should be a valid integer, found None"),
        ("length", {"target": 0}, "rewards: length: target: should be greater than 0, found 0; correct its args"),
        ("length", {"target": 3, "unit": "tokens"}, "length: unit: should be 'words' or 'characters', found 'tokens'"),
        ("regex", {"pattern": 5}, "rewards: regex: pattern: should be a valid string, found 5"),
        ("regex", {"pattern": "("}, r"rewards: regex: pattern: no regular expression: missing \), .*, found '\('"),
        ("keyword", {"words": []}, r"rewards: keyword: words: give words: \[...\], none of them empty, found \[\]"),
        ("keyword", {"words": ["please", ""]}, "rewards: keyword: words: give words"),
        ("keyword", {}, r"rewards: keyword: give words: \[...\] or scores: .*, one of the two; correct its args"),
        ("keyword", {"words": ["a"], "scores": {"a": 1}}, "rewards: keyword: give words: .* one of the two"),
        ("keyword", {"scores": {}}, r"keyword: scores: give scores: \{word: number\}, no word of it empty, found \{\}"),
        ("keyword", {"scores": {" ": 1}}, "keyword: scores: give scores"),
        ("keyword", {"scores": ["a"]}, r"keyword: scores: should be a valid dictionary, found \['a'\]"),
        ("keyword", {"scores": {"a": "high"}}, r"keyword: scores\['a'\]: should be a valid number, .*, found 'high'"),
        ("keyword", {"scores": {"a": float("inf")}}, r"keyword: scores\['a'\]: should be a finite number, found inf"),
        (
            "keyword",
            {"scores": {True: 1}},
            "keyword: scores: YAML reads yes, no, on and off as True; put such words in",
        ),
        ("keyword", {"scores": {"a": 1, "A": 2}}, "keyword: scores: a is there twice when case is ignored"),
        ("numeric_match", {"tolerance": -1}, "tolerance: should be greater than or equal to 0, found -1"),
        ("numeric_match", {"tolerance": float("nan")}, "tolerance: should be a finite number, found nan"),
        ("length", {"target": 3, "unti": "words"}, "rewards: length: .*'unti'.*did you mean unit"),
        ("length", {"target": 3, "record": 1}, "rewards: length: .*record"),
    ],
)
def test_an_argument_a_reward_cannot_take_is_refused_when_the_settings_are_read(name, args, message):
    settings = {"model": "m", "data": "d", "name": "n", "rewards": [{"name": name, "args": args}]}

    with pytest.raises(UsageError, match=message):
        build(PpoConfig, settings)


def test_arguments_reach_a_reward_as_the_types_it_asks_for():
    @reward
    def typed_in_this_test(record, completion, steps: tuple[int, ...], scale: float = 1.0, **rest):
        assert isinstance(steps, tuple)
        return scale * sum(steps) + rest["bonus"]

    typed_in_this_test.__annotations__["rest"] = "Unheard"

    assert score("typed_in_this_test", "x", steps=[1, 2], scale=2, bonus=0.5) == 6.5
    with pytest.raises(UsageError, match=r"scale: should be a valid number, .*, found 'much'"):
        score("typed_in_this_test", "x", steps=[1], scale="much", bonus=0)


@reward(batched=True)
def plays_to_many_in_these_tests(records, completions):
    """Returns what a test put there, or raises it."""
    if isinstance(PLAYED[0], Exception):
        raise PLAYED[0]
    return PLAYED[0]


MANY = [Record(source="a.jsonl", line=line) for line in (7, 8)]


def play_to_many(value):
    PLAYED[:] = [value]
    sum_of_two = WeightedRewards(
        [RewardSettings(name="plays_to_many_in_these_tests"), RewardSettings(name="length", args={"target": 2})]
    )
    return sum_of_two.score_all(MANY, ["one", "one two"])


@pytest.mark.parametrize("value", [[1, 2.5], (1, 2.5), numpy.array([1, 2.5])])
def test_a_batched_reward_gives_a_number_a_completion(value):
    assert play_to_many(value) == [
        {"plays_to_many_in_these_tests": 1.0, "length": 0.5},
        {"plays_to_many_in_these_tests": 2.5, "length": 1.0},
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1.0], r"returned 1 values, \[1.0\], for 2 completions, the first 'one' of a\.jsonl:7; expected one number a"),
        (1.0, "returned 1.0 for 2 completions, the first 'one' of a.jsonl:7; expected one number a completion"),
        ("12", "returned '12' for 2 completions"),
        ({0: 1.0, 1: 2.0}, "returned .* for 2 completions"),
        ([1.0, float("nan")], r"returned nan for the completion 'one two' of a\.jsonl:8; expected one finite number"),
        ([None, 1.0], r"returned None for the completion 'one' of a\.jsonl:7"),
        (ValueError("no"), r"raised ValueError for 2 completions, the first 'one' of a\.jsonl:7: 'no'; correct"),
    ],
)
def test_what_a_batched_reward_may_not_return_is_told_with_its_place(value, told):
    with pytest.raises(DataError, match=f"reward plays_to_many_in_these_tests: {told}"):
        play_to_many(value)


def test_a_sum_of_no_rewards_and_a_batch_of_no_completions_are_empty():
    assert WeightedRewards([]).score_all(MANY, ["a", "b"]) == [{}, {}]
    assert WeightedRewards([RewardSettings(name="plays_to_many_in_these_tests")]).score_all([], []) == []


def test_the_judge_of_the_small_world_is_a_reward():
    asked = Record(prompt=[{"role": "user", "content": "What colour is the kettle?"}])

    assert WeightedRewards([RewardSettings(name="small_world")]).score_all([asked], [""])[0] == {"small_world": 0.0}


def test_numeric_match_agrees_with_the_people_who_marked_2632_solutions(real_data):
    match = WeightedRewards([RewardSettings(name="numeric_match")])
    rows = (real_data / "verifiable" / "gsm8k_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    marked = [
        (row["ground_truth"], found["solution"], found["is_correct"])
        for row in map(json.loads, rows)
        for found in row.values()
        if isinstance(found, dict)
    ]

    values = match.score_all([Record(answer=truth) for truth, _, _ in marked], [solution for _, solution, _ in marked])

    assert [value["numeric_match"] == 1.0 for value in values] == [right for _, _, right in marked]


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("He makes 2 * 35,000 = 70,000.\n#### 70,000", "so $70,000.00 in all", "so 70 or 70,00"),
        ("It falls by 12 degrees.\n#### -7", "It is then −7°C.", "It is then 7 degrees below"),
        ("#### -1,250", "a loss: -$1,250", "1,250"),
        ("1234.5", "#### 1,234.50", "1,234"),
    ],
)
def test_a_row_like_those_of_gsm8k_is_matched_by_number(tmp_path, reference, right, wrong):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"question": "How much?", "answer": reference}) + "\n")
    (record,) = load_records(str(path), view="prompt").records
    match = WeightedRewards([RewardSettings(name="numeric_match")])

    assert match.score_all([record], [right])[0] == {"numeric_match": 1.0}
    assert match.score_all([record], [wrong])[0] == {"numeric_match": 0.0}


def test_the_judge_of_the_support_desk_is_a_reward_over_its_own_rows_alone(tmp_path):
    records = load_records(str(write_desk(tmp_path, 0, DeskSizes(prompts=20))["prompts"]), view="prompt").records
    chat = next(record for record in records if record.meta["kind"] == "chat")
    gold = GoldRewards([RewardSettings(name="support_desk")])
    gold.load(None, records)

    assert gold.measure([chat, chat], ["You are welcome!", ""]) == {"gold_mean": 0.5}
    with pytest.raises(DataError, match="desk-"):
        gold.measure([Record(prompt=[user("Hello!")])], ["Hello!"])
