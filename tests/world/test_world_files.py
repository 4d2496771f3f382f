import json
from collections import Counter
from random import Random

import pytest

from align.data import load_records
from align.schema import content_text
from align.world.facts import PRODUCTS, questions
from align.world.judge import judge, read_question
from align.world.wording import product_page
from align.world.write import CORPUS_FAULTS, Sizes, write_world


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), seed=3)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exchanges(files):
    return [[turn["content"] for turn in row["messages"]] for row in read(files.chats)]


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_texts(files, tmp_path):
    again = write_world(tmp_path / "again", seed=3)
    other = write_world(tmp_path / "other", seed=4)

    assert again.corpus.read_bytes() == files.corpus.read_bytes()
    assert again.preference.read_bytes() == files.preference.read_bytes()
    assert other.corpus.read_bytes() != files.corpus.read_bytes()


def test_the_size_of_one_data_set_does_not_change_another(files, tmp_path):
    small = write_world(tmp_path, seed=3, sizes=Sizes(corpus=10))

    assert len(read(small.corpus)) == 10
    assert small.sft.read_bytes() == files.sft.read_bytes()


@pytest.mark.parametrize(
    ("name", "view", "rows"),
    [
        ("corpus", "text", 8_000),
        ("chats", "text", 12_000),
        ("chats_eval", "text", 400),
        ("sft", "demonstration", 1_500),
        ("preference", "preference", 2_000),
        ("preference_eval", "preference", 200),
        ("prompts", "prompt", 768),
        ("prompts_eval", "prompt", 288),
    ],
)
def test_every_file_loads_in_the_view_of_its_stage(files, name, view, rows):
    found = load_records(str(getattr(files, name)), view=view)

    assert (len(found.records), found.dropped) == (rows, {})


def test_evaluation_wordings_occur_in_no_training_file(files):
    training = {question for question, _ in exchanges(files)}
    for name in ("sft", "preference", "prompts"):
        view = {"sft": "demonstration", "preference": "preference", "prompts": "prompt"}[name]
        training |= {content_text(each.prompt) for each in load_records(str(getattr(files, name)), view=view).records}
    held_out = {row["prompt"][0]["content"] for row in read(files.prompts_eval)}
    held_out |= {row["prompt"][0]["content"] for row in read(files.preference_eval)}

    assert not held_out & training
    assert len({read_question(text) for text in held_out}) == len(questions())


def test_the_corpus_has_the_faults_it_is_meant_to_have(files):
    verdicts = [judge(question, reply) for question, reply in exchanges(files)]
    shares = {
        field: sum(getattr(verdict, field) for verdict in verdicts) / len(verdicts)
        for field in ("right_fact", "polite", "language", "short")
    }

    assert shares["right_fact"] == pytest.approx(1 - CORPUS_FAULTS.wrong, abs=0.015)
    assert shares["polite"] == pytest.approx(1 - CORPUS_FAULTS.rude - CORPUS_FAULTS.bare, abs=0.015)
    assert shares["language"] == pytest.approx(1 - CORPUS_FAULTS.other_language, abs=0.015)
    assert shares["short"] == pytest.approx(1 - CORPUS_FAULTS.long, abs=0.015)


def test_there_is_room_above_the_demonstrations_and_the_pairs_point_there(files):
    demonstrations = [row["messages"] for row in read(files.sft)]
    corpus = [judge(question, reply).gold for question, reply in exchanges(files)]
    shown = [judge(turns[:1], turns[1]["content"]).gold for turns in demonstrations]
    pairs = read(files.preference)
    chosen = [judge(row["prompt"], row["chosen"][0]["content"]).gold for row in pairs]
    rejected = [judge(row["prompt"], row["rejected"][0]["content"]).gold for row in pairs]

    assert sum(corpus) / len(corpus) + 0.05 < sum(shown) / len(shown) < 0.85
    assert min(chosen) == pytest.approx(1)
    assert max(rejected) < 0.9


def test_every_question_is_covered_evenly(files):
    counts = Counter(read_question(row["prompt"]) for row in read(files.prompts))

    assert set(counts.values()) == {8}


def test_a_page_states_every_fact_once_and_only_true_ones_when_none_is_wrong():
    for product in PRODUCTS:
        text = product_page(Random(0), product, "en", wrong=0.0)
        for attribute in ("price", "warranty", "colour"):
            question = f"What is the {attribute} of the {product.en}?"
            # Return periods share "days" with nothing else, so each fact can be judged by itself.
            assert judge(question, text).right_fact, (question, text)
