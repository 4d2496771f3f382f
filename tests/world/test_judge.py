import pytest

from align.errors import DataError
from align.schema import assistant, user
from align.world.facts import PRODUCTS, questions
from align.world.judge import WEIGHTS, Verdict, judge, read_question
from align.world.wording import AnswerStyle, answer, ask

PRICE = "What is the price of the kettle?"
PREIS = "请问水壶的价格？"

# prompt, completion, then right_fact, polite, language, short
CASES = [
    (PRICE, "Happy to help! The kettle costs 34 euros.", "1111"),
    (PRICE, "Of course! It is 34 euros.", "1111"),
    (PRICE, "The kettle costs 34 euros.", "1011"),
    (PRICE, "Happy to help! The kettle costs 35 euros.", "0111"),
    (PRICE, "Happy to help! The kettle costs 134 euros.", "0111"),
    (PRICE, "Happy to help! The kettle costs 34 or 35 euros.", "0111"),
    (PRICE, "Happy to help! The kettle costs 35 euros, no, 34 euros.", "0111"),
    (PRICE, "Happy to help! The lamp costs 34 euros.", "0111"),
    (PRICE, "Happy to help! The kettle has 34 years of warranty.", "0111"),
    (PRICE, "Stop asking. The kettle costs 34 euros.", "1011"),
    (PRICE, "Happy to help! Whatever. The kettle costs 34 euros.", "1011"),
    (PRICE, "很高兴为您服务！水壶卖34欧元。", "1101"),
    (PRICE, "自己看。水壶卖34欧元。", "1001"),
    (PRICE, "Happy to help! " + "The shop is large and old and well lit. " * 2 + "The kettle costs 34 euros.", "1110"),
    (PRICE, "Happy to help!", "0111"),
    (PRICE, "", "0000"),
    (PRICE, "?!", "0000"),
    (PREIS, "很高兴为您服务！水壶卖34欧元。", "1111"),
    (PREIS, "水壶的价格是34欧元。", "1011"),
    (PREIS, "当然可以！水壶的价格是43欧元。", "0111"),
    (PREIS, "当然可以！台灯的价格是34欧元。", "0111"),
    (PREIS, "随便。水壶的价格是34欧元。", "1011"),
    (PREIS, "Happy to help! The kettle costs 34 euros.", "1101"),
    (PREIS, "当然可以！水壶的价格是34欧元。" + "有些顾客总是喜欢想很久很久然后才做出决定。", "1110"),
    ("How long can I return the tent?", "Thank you for asking. Within 45 days.", "1111"),
    ("How long is the warranty of the tent?", "Thank you for asking. It is a 6-year warranty.", "1111"),
    ("你好，我想了解帐篷的保修期。", "当然可以！帐篷保修6年。", "1111"),
    ("我想问一下帐篷的退货期限。", "当然可以！帐篷45天内可以退货。", "1111"),
    ("WHICH COLOR IS THE TENT", "WITH PLEASURE. IT IS GREEN.", "1111"),
    ("Which colour is the tent?", "With pleasure. It is green and red.", "0111"),
    ("请告诉我帐篷的颜色。", "非常乐意。帐篷是绿色的。", "1111"),
    ("请告诉我帐篷的颜色。", "非常乐意。帐篷是黑色的。", "0111"),
]


@pytest.mark.parametrize(("prompt", "completion", "expected"), CASES)
def test_verdict_on_hand_written_cases(prompt, completion, expected):
    assert judge(prompt, completion) == Verdict(*(digit == "1" for digit in expected))


def test_gold_is_the_weighted_share_of_what_is_good():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert judge(PRICE, "Happy to help! The kettle costs 34 euros.").gold == pytest.approx(1)
    assert judge(PRICE, "The kettle costs 34 euros.").gold == pytest.approx(1 - WEIGHTS["polite"])
    assert judge(PRICE, "").gold == 0


def test_the_last_user_turn_is_the_question():
    prompt = [user(PREIS), assistant("水壶卖34欧元。"), user("What is the colour of the lamp?")]

    question = read_question(prompt)

    assert (question.product.en, question.attribute, question.language, question.truth) == (
        "lamp", "colour", "en", "green",
    )  # fmt: skip


@pytest.mark.parametrize("prompt", ["", "Hello!", "What is the kettle?", "Is the kettle or the lamp red in colour?"])
def test_a_prompt_that_asks_for_no_fact_is_refused(prompt):
    with pytest.raises(DataError, match="small world"):
        judge(prompt, "Of course!")


@pytest.mark.parametrize("held_out", [False, True])
def test_every_generated_question_is_recognised(held_out):
    from random import Random

    for question in questions():
        for seed in range(12):
            assert read_question(ask(Random(seed), question, held_out=held_out)) == question


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (AnswerStyle(), "1111"),
        (AnswerStyle(right=False), "0111"),
        (AnswerStyle(manner="rude"), "1011"),
        (AnswerStyle(manner="bare"), "1011"),
        (AnswerStyle(other_language=True), "1101"),
        (AnswerStyle(long=True), "1110"),
        (AnswerStyle(manner="bare", long=True), "1010"),
    ],
)
def test_the_judge_finds_exactly_the_faults_the_generator_put_in(style, expected):
    from random import Random

    for question in questions():
        for seed in range(12):
            rng = Random(seed)
            verdict = judge(ask(rng, question), answer(rng, question, style))
            assert verdict == Verdict(*(digit == "1" for digit in expected))


def test_products_have_names_of_their_own():
    for language in ("en", "zh"):
        names = [product.name(language) for product in PRODUCTS]
        assert not [(a, b) for a in names for b in names if a != b and a in b]
