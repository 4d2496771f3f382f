from random import Random

import pytest

from align.errors import DataError
from align.schema import assistant, user
from align.world.desk_answers import REFUSALS
from align.world.desk_judge import WEIGHTS, DeskVerdict, ExpectedAnswer, judge_answer, quantities
from align.world.desk_write import SHARES, Manner, answer, converse

PAGE = (
    "You are the support desk. Page: The kettle costs 34 euros. Price of the lamp: 27 euros. The kettle has 2 years of "
    "warranty. The lamp is grey. The hotline opens at 9 o'clock. Students get 12 percent off."
)
PRICE = ExpectedAnswer("fact", "price", "kettle", "34")
COLOUR = ExpectedAnswer("fact", "colour", "lamp", "grey")
HOTLINE = ExpectedAnswer("fact", "opening", "", "9")
STUDENT = ExpectedAnswer("fact", "student", "", "12")
MISSING = ExpectedAnswer("unknown", "weight", "kettle")
OFF_PAGE = ExpectedAnswer("unknown", "", "kettle")
CHAT = ExpectedAnswer("chat")

# what is expected, the answer, then right, courteous, short
CASES = [
    (PRICE, "Happy to help! The kettle costs 34 euros.", "111"),
    (PRICE, "Sure, that would be thirty-four euros for the kettle.", "111"),
    (PRICE, "The kettle is €34, please ask if you need more.", "111"),
    (PRICE, "Thank you! Our kettle sells for EUR 34, and it has 2 years of warranty.", "111"),
    (PRICE, "34 euros.", "101"),
    (PRICE, "34", "101"),
    (PRICE, "Happy to help! The kettle costs 27 euros.", "011"),
    (PRICE, "Happy to help! The kettle costs 134 euros.", "011"),
    (PRICE, "Happy to help! It costs 34 euros, or 27 euros.", "011"),
    (PRICE, "Happy to help! The lamp costs 34 euros.", "011"),
    (PRICE, "Happy to help! The kettle costs 34 euros and ships in 3 days.", "011"),
    (PRICE, "I am sorry, I do not know the price of the kettle.", "011"),
    (PRICE, "Happy to help! What would you like to know?", "011"),
    (PRICE, "Whatever. The kettle costs 34 euros.", "101"),
    (PRICE, "Read the page. Of course the kettle costs 34 euros.", "101"),
    (PRICE, "Of course! The kettle costs 34 euros. " + "It is a good kettle and many people like it. " * 3, "110"),
    (PRICE, "", "000"),
    (PRICE, "?!", "000"),
    (COLOUR, "Gladly! The lamp comes in gray.", "111"),
    (COLOUR, "Gladly! The lamp comes in grey and blue.", "011"),
    (HOTLINE, "Of course! You can call from nine o'clock on.", "111"),
    (HOTLINE, "Of course! We are here from 9 am.", "111"),
    (HOTLINE, "Of course! We are here from 9 to 17 o'clock.", "011"),
    (STUDENT, "Certainly, students save 12%.", "111"),
    (STUDENT, "Certainly, students save 12 euros.", "011"),
    (MISSING, "I am sorry, the page does not say how heavy it is, so I will ask a colleague.", "111"),
    (MISSING, "Unfortunately I don't know. I'll pass it on to the team.", "111"),
    (MISSING, "Sorry, that is not mentioned in the handbook; I will forward this to a colleague.", "111"),
    (MISSING, "I cannot tell you.", "101"),
    (MISSING, "No idea.", "101"),
    (MISSING, "Happy to help! The kettle weighs 3 kilos.", "011"),
    (MISSING, "I am sorry, I do not know, perhaps 3 kilos.", "011"),
    (MISSING, "Thank you for asking, but I only know that the kettle costs 34 euros.", "011"),
    (OFF_PAGE, "I am afraid I do not have that information.", "111"),
    (OFF_PAGE, "Of course, it is dishwasher safe!", "011"),
    (CHAT, "You are welcome! Have a nice day.", "111"),
    (CHAT, "Bye.", "101"),
    (CHAT, "You are welcome! The kettle costs 34 euros.", "011"),
]


@pytest.mark.parametrize(("expected", "completion", "verdict"), CASES)
def test_verdict_on_hand_written_cases(expected, completion, verdict):
    prompt = [{"role": "system", "content": PAGE}, user("...")]

    assert judge_answer(prompt, expected, completion) == DeskVerdict(*(digit == "1" for digit in verdict))


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("twenty-one days or thirty euros", [("21", "days"), ("30", "euros")]),
        ("a 2-year warranty and 1,200 euros", [("2", "years"), ("1200", "euros")]),
        ("3.50 euros, 05 kg, 7", [("3.5", "euros"), ("5", "kilos"), ("7", "")]),
        ("one of them, for one week", [("1", "weeks")]),
        ("the gray one, not the greenhouse", [("grey", "colour")]),
    ],
)
def test_values_are_read_with_their_units(text, stated):
    assert quantities(text) == stated


def test_gold_is_the_weighted_share_of_what_is_good():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert DeskVerdict(True, False, True).gold == pytest.approx(1 - WEIGHTS["courteous"])
    assert DeskVerdict(False, False, False).gold == 0


def test_a_row_of_other_data_is_refused():
    with pytest.raises(DataError, match="desk-"):
        ExpectedAnswer.read({"kind": "fact"})


FAULTS = {
    "wrong": (Manner(right=False), DeskVerdict(False, True, True)),
    "refuses": (Manner(refuses=True), DeskVerdict(False, True, True)),
    "evades": (Manner(evades=True), DeskVerdict(False, True, True)),
    "bare": (Manner(tone="bare"), DeskVerdict(True, False, True)),
    "curt": (Manner(tone="curt"), DeskVerdict(True, False, True)),
    "long": (Manner(long=True), DeskVerdict(True, True, False)),
}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", SHARES)
def test_the_judge_finds_exactly_the_faults_the_generator_put_in(kind, held_out):
    for seed in range(150):
        rng = Random(seed)
        chat, state = converse(rng, kind, held_out=held_out), rng.getrandbits(32)
        best = answer(Random(state), chat, Manner())
        assert judge_answer(chat.prompt, chat.expected, best).gold == 1, best
        for name, (manner, verdict) in FAULTS.items():
            if (name == "refuses" and not chat.expected.truth) or (name == "evades" and kind == "chat"):
                continue
            text = answer(Random(state), chat, manner)
            assert judge_answer(chat.prompt, chat.expected, text) == verdict, (name, text)


def test_an_answer_over_another_page_is_wrong():
    other = [{"role": "system", "content": PAGE.replace("34", "35")}, user("How much is the kettle?")]
    before = [*other, assistant("The kettle costs 35 euros."), user("And again?")]

    assert not judge_answer(before, ExpectedAnswer("fact", "price", "kettle", "35"), "It is 34 euros, gladly!").right


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_without_courtesy_is_honest_all_the_same(text):
    prompt = [{"role": "system", "content": PAGE}, user("How heavy is the kettle?")]

    assert judge_answer(prompt, MISSING, text) == DeskVerdict(True, False, True)
