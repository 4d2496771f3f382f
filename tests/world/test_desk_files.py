import json
from collections import Counter

import pytest

from align.data import load_records
from align.evaluation.scorers.ifeval import follows
from align.schema import content_text
from align.world import desk_questions
from align.world.desk_facts import HELD_OUT_PRODUCTS, PRODUCTS, TOPICS, page_of, products_in
from align.world.desk_instructions import ENDINGS, SUBJECTS
from align.world.desk_judge import ExpectedAnswer, judge_answer
from align.world.desk_write import SHARES, DeskSizes, write_desk


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_desk(tmp_path_factory.mktemp("desk"), seed=3)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_texts(files, tmp_path):
    again, other = write_desk(tmp_path / "again", seed=3), write_desk(tmp_path / "other", seed=4)

    for name, path in files.items():
        assert again[name].read_bytes() == path.read_bytes()
        assert (other[name].read_bytes() == path.read_bytes()) == (name == "prose")


def test_the_size_of_one_data_set_does_not_change_another(files, tmp_path):
    small = write_desk(tmp_path, seed=3, sizes=DeskSizes(preference=10))

    assert len(read(small["preference"])) == 10
    assert small["sft"].read_bytes() == files["sft"].read_bytes()


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("sft", "demonstration"),
        ("preference", "preference"),
        ("preference_eval", "preference"),
        ("prompts", "prompt"),
        ("prompts_eval", "prompt"),
        ("instructions", "prompt"),
        ("prose", "text"),
    ],
)
def test_every_file_loads_in_the_view_of_its_stage(files, name, view):
    found = load_records(str(files[name]), view=view)

    assert (len(found.records), found.dropped) == (getattr(DeskSizes(), name, len(found.records)), {})


def test_evaluation_wordings_and_products_occur_in_no_training_file(files):
    training = "".join(files[name].read_text(encoding="utf-8") for name in ("sft", "preference", "prompts")).lower()
    asked = {turn["content"] for row in read(files["prompts_eval"]) for turn in row["prompt"] if turn["role"] == "user"}

    assert not [text for text in asked if text.lower() in training]
    assert products_in(training) == set(PRODUCTS) - set(HELD_OUT_PRODUCTS)


def test_held_out_wordings_are_others_for_every_topic():
    pairs = [
        (desk_questions.QUESTIONS, desk_questions.HELD_OUT_QUESTIONS),
        (desk_questions.FOLLOW_UPS, desk_questions.HELD_OUT_FOLLOW_UPS),
    ]
    for ours, held_out in pairs:
        assert ours.keys() == held_out.keys()
        assert not {text for texts in ours.values() for text in texts} & {
            t for texts in held_out.values() for t in texts
        }
    assert desk_questions.QUESTIONS.keys() == TOPICS.keys()


def test_the_kinds_have_their_shares(files):
    rows = read(files["prompts"])
    counts = Counter(row["kind"] for row in rows)
    turns = [sum(turn["role"] == "user" for turn in row["prompt"]) for row in rows]

    for kind in ("fact", "distractor", "chat"):
        assert counts[kind] == len(rows) * SHARES[kind] / 20
    assert 0.12 < counts["follow_up"] / len(rows) < 0.2  # a fourth of the follow-ups is about what the page lacks
    assert 0.2 < sum(count == 2 for count in turns) / len(rows) < 0.35


def test_every_page_states_the_truth_and_a_distractor(files):
    for row in read(files["prompts"]):
        page, expected = page_of(row["prompt"][0]["content"]), ExpectedAnswer.read(row)
        if expected.truth:
            unit = TOPICS[expected.topic].unit
            assert expected.truth in page, row
            assert judge_answer(row["prompt"], expected, f"Gladly! {expected.truth} {unit}").right
        else:
            assert not any(
                line.format(p=expected.product, v="").split(".")[0].rstrip(": ") in page
                for line in (TOPICS[expected.topic].lines if expected.topic else ())
                if line.endswith("{v}.")
            )


def test_demonstrations_leave_room_and_the_pairs_point_there(files):
    tones = Counter("!" in row["messages"][-1]["content"] for row in read(files["sft"]))
    pairs = read(files["preference"])

    assert min(tones.values()) > 40
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    assert len({content_text(row["prompt"]) for row in pairs}) > 0.95 * len(pairs)


def test_instructions_are_ifevals_and_can_be_followed_and_missed(files):
    rows = read(files["instructions"])
    given = [
        "", "RAIN IS WET AND COLD.", "rain is wet. it falls from clouds.", '"Rain."', "<<Rain>>", '{"a": 1}',
        "* a\n* b", "* a\n* b\n* c", "Rain, and " + "very wet rain " * 14, *ENDINGS, *SUBJECTS.values(),
    ]  # fmt: skip

    for row in rows:
        (name,), (arguments,) = row["instruction_id_list"], row["kwargs"]
        verdicts = [follows(text, name, arguments) for text in given]
        assert True in verdicts, row
        assert False in verdicts[1:], row
    assert len({row["instruction_id_list"][0] for row in rows}) >= 11


def test_the_prose_is_long_enough_and_about_no_shop(files):
    words = [word for row in read(files["prose"]) for word in row["text"].split()]

    assert len(words) > 3000
    assert "handbook" not in words
