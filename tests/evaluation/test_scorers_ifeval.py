"""IFEval's instructions one by one, each with a response that follows it and one that nearly does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from align.data import load_records
from align.errors import DataError
from align.evaluation.languages import detect_language
from align.evaluation.scorers import scorer_named
from align.evaluation.scorers.ifeval import CHECKS, count_sentences, follows, loose_variants
from align.schema import Record, user

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
# instruction: arguments, a response that follows it, one that does not
CASES = {
    "keywords:existence": ({"keywords": ["kettle", "C++"]}, "Kettles speak c++.", "Kettles speak C."),
    "keywords:frequency": ({"keyword": "tea", "frequency": 2, **AT_LEAST}, "Tea and teapots", "Tea and pots"),
    "keywords:forbidden_words": ({"forbidden_words": ["rock"]}, "Rocks", "A Rock."),
    "keywords:letter_frequency": (
        {"letter": "E", "let_frequency": 2, "let_relation": "less than"},
        "One",
        "Here",
    ),
    "language:response_language": ({"language": "de"}, "Das ist ein Kessel und nicht mehr.", "That is a kettle."),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, **LESS},
        "Mr. Fox paid 3.5 pounds. He left",
        "One. Two! Three?",
    ),
    "length_constraints:number_words": ({"num_words": 3, **AT_LEAST}, "one two-three", "one two"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo\n***\n", "one\n***\n\n***\ntwo"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "kettle"},
        'Tea.\n\n"Kettle", he said.',
        "Tea.\n\nKettles, he said.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [place]", "[name] of [place"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "Bye.\np.p.s more", "Bye.\nP.S. more"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "Two:\n* one\n  - two", "* one\n** two"),
    "detectable_format:constrained_response": ({}, "Well, My answer is no.", "My answer is nope."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and **two**", "*one* and ** **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1\none\nPart2\ntwo",
        "Part 1\none\npart 2\ntwo",
    ),
    "detectable_format:json_format": ({}, '```JSON\n{"a": [1, 2]}\n```', 'Sure: {"a": 1}'),
    "detectable_format:title": ({}, "<<A kettle>>\nIt boils.", "<< >>\nIt boils."),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Write a line."}, "write a line. Done.", "Done."),
    "startend:end_checker": ({"end_phrase": "Any questions?"}, '"So much. any questions?"', "Any questions? None."),
    "startend:quotation": ({}, ' "All of it" ', '"All" of it'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "I'LL say",
        "ILL say",
    ),
    "change_case:english_capital": ({}, "THE KETTLE IS HOT.", "THE KETTLE IS hot."),
    "change_case:english_lowercase": ({}, "the kettle is hot.", "The kettle is hot."),
    "punctuation:no_comma": ({}, "one; two", "one, two"),
}
LANGUAGES = {
    "en": "I went to the shop and bought some bread.",
    "de": "Ich gehe heute in die Stadt und kaufe Brot.",
    "fr": "Je suis allé au magasin pour acheter du pain.",
    "es": "Fui a la tienda para comprar pan y leche.",
    "pt": "Eu fui à loja para comprar pão e não encontrei nada.",
    "it": "Sono andato al negozio per comprare il pane.",
    "vi": "Tôi đã đi đến cửa hàng để mua bánh mì.",
    "sw": "Nilienda dukani kununua mkate na maziwa kwa ajili ya watoto.",
    "fi": "Kävin kaupassa ja ostin leipää, mutta se ei ollut hyvää.",
    "pl": "Poszedłem do sklepu, aby kupić chleb i mleko.",
    "ru": "Я пошёл в магазин и купил хлеб.",
    "uk": "Я пішов до магазину і купив хліб.",
    "bg": "Отидох в магазина и купих хляб за да ям.",
    "ar": "ذهبت إلى المتجر واشتريت الخبز من هناك",
    "fa": "من به فروشگاه رفتم و نان خریدم که خوب بود",
    "ur": "میں دکان پر گیا اور روٹی خریدی ہے",
    "hi": "मैं दुकान पर गया और रोटी खरीदी है",
    "mr": "मी दुकानात गेलो आणि भाकरी घेतली आहे",
    "ne": "म पसलमा गएँ र रोटी किनेको छु भने",
    "kn": "ನಾನು ಅಂಗಡಿಗೆ ಹೋದೆ",
    "pa": "ਮੈਂ ਦੁਕਾਨ ਤੇ ਗਿਆ",
    "ko": "나는 가게에 갔다",
    "ja": "私は店に行きました",
    "zh": "我去商店买面包",
    "th": "ฉันไปร้านค้า",
    "he": "הלכתי לחנות",
    "bn": "আমি দোকানে গেলাম",
}


def test_every_instruction_of_the_paper_is_checked():
    assert set(CASES) == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize("instruction", CASES)
def test_an_instruction_is_followed_or_not(instruction):
    arguments, good, bad = CASES[instruction]

    assert follows(good, instruction, arguments)
    assert not follows(bad, instruction, arguments)
    assert not follows(" \n", instruction, arguments)


@pytest.mark.parametrize(("count", "relation", "good"), [(2, "at least", True), (2, "less than", False)])
def test_at_least_includes_and_less_than_excludes_the_number(count, relation, good):
    assert follows("one two", "length_constraints:number_words", {"num_words": count, "relation": relation}) is good


def test_null_arguments_are_none():
    assert follows("one two", "punctuation:no_comma", {"num_words": None, "keywords": None})


@pytest.mark.parametrize(
    ("instruction", "arguments", "message"),
    [
        ("punctuation:no_coma", {}, r"not known; did you mean punctuation:no_comma\?"),
        ("length_constraints:number_words", {}, "its arguments {} do not fit"),
        ("length_constraints:number_words", {"num_words": "ten", **LESS}, "do not fit"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "relation 'about': not known"),
        ("keywords:existence", {"keywords": 3}, "do not fit"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_told(instruction, arguments, message):
    with pytest.raises(DataError, match=message):
        follows("Some words.", instruction, arguments)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ('He said "No." Then he left.', 2),
        ("It costs 3.5 pounds, e.g. today, says Dr. Fox of the U.S. team", 1),
        ("Wait... what?!", 2),
        ("九点开门。五点关门！对吗", 3),
        ("no end", 1),
        ("...", 0),
    ],
)
def test_sentences_are_counted(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages_are_told_apart(language):
    assert detect_language(LANGUAGES[language]) == language


@pytest.mark.parametrize("text", ["", "123 !?", "☃ ☃"])
def test_what_has_no_letters_is_in_no_language(text):
    assert detect_language(text) is None


def test_the_loose_kind_forgives_an_opening_an_ending_and_asterisks():
    assert loose_variants("a\n*b*\nc") == ["a\n*b*\nc", "a\n*b*", "*b*\nc", "*b*", "a\nb\nc", "a\nb", "b\nc", "b"]

    meta = {
        "instruction_id_list": ["startend:quotation", "punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {}, {"num_words": 99, "relation": "at least"}],
    }
    values = scorer_named("ifeval")(Record(prompt=[user("?")], meta=meta), 'Sure, here it is:\n"All of it"')

    assert values == {
        "prompt_strict": 0.0,
        "instruction_strict": 0.0,
        "prompt_loose": 0.0,
        "instruction_loose": pytest.approx(2 / 3),
        "instructions": 3.0,
    }


@pytest.mark.parametrize("meta", [{"kwargs": []}, {"kwargs": [3]}, {"kwargs": [{}, {}]}, {"kwargs": {}}])
def test_lists_of_different_length_are_told(meta):
    record = Record(prompt=[user("?")], meta={"instruction_id_list": ["punctuation:no_comma"]} | meta)

    with pytest.raises(DataError, match="instruction_id_list and kwargs of"):
        scorer_named("ifeval")(record, "x")


@pytest.mark.parametrize("junk", ["[", "<<", "!", "*", "\n", "#", "{", "P.", " ", "\x00", "中。"])
def test_junk_of_any_size_takes_no_time(junk):
    start = time.thread_time()

    for instruction, (arguments, _, _) in CASES.items():
        follows(junk * (100_000 // len(junk)) + "x", instruction, arguments)

    assert time.thread_time() - start < 5


def test_every_published_prompt_can_be_checked(real_data: Path):
    records = load_records(f"ifeval:source={real_data}/eval/ifeval.jsonl").records

    values = [scorer_named("ifeval")(record, "Sure.\nNo commas here.") for record in records]

    assert {name for record in records for name in record.meta["instruction_id_list"]} == set(CHECKS)
    assert all(each["prompt_loose"] >= each["prompt_strict"] for each in values)
    assert 0 < sum(each["prompt_strict"] for each in values) < len(values) / 4
