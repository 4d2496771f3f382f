"""Votes as a dataset: which are asked for, what each view takes of them, and files that were torn."""

from __future__ import annotations

import json

import pytest

from align.data import load_records
from align.errors import DataError, UsageError
from align.schema import assistant, user


def vote(number: int, choice: str = "a", **more) -> dict:
    row = {"id": f"v{number}", "prompt": [user(f"Question {number}")], "choice": choice}
    row |= {"a": [assistant(f"first {number}")], "b": [assistant(f"second {number}")]}
    row |= {"models": {"a": "red@v1", "b": "blue@v2"}, "mode": "blind", "voter": "ann"}
    return row | {"time": f"2026-11-{number + 1:02}T10:00:00.000+00:00"} | more


@pytest.fixture
def load(tmp_path):
    def load(rows, spec="votes", view="preference", tail=""):
        folder = tmp_path / "votes"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "shard.jsonl").write_bytes(text.encode() + (tail if isinstance(tail, bytes) else tail.encode()))
        return load_records(spec, view=view, roots={"registry": tmp_path})

    return load


def answers(found) -> list[tuple[str, bool]]:
    return [(record.completion[0]["content"], record.label) for record in found.records]


def numbers(found) -> list[str]:
    return [record.id for record in found.records]


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ("mode=blind", ["v0", "v2", "v3"]),
        ("since=2026-11-03", ["v2", "v3"]),
        ("since=2026-11-02T10:00:00", ["v1", "v2", "v3"]),
        ("until=2026-11-03", ["v0", "v1"]),
        ("mode=blind,since=2026-11-02,until=2026-11-04", ["v2"]),
        ("voter=ben", ["v3"]),
        ("voter=ann,ben:mode=named", ["v1"]),
        ("models=green", ["v2"]),
        ("models=red,blue", ["v0", "v1", "v3"]),
        ("models=red@v1,blue@v2", ["v0", "v1"]),
        ("models=red:limit=2", ["v0", "v1"]),
    ],
)
def test_only_the_votes_asked_for_are_taken(load, asked, taken):
    rows = [
        vote(0),
        vote(1, mode="named"),
        vote(2, models={"a": "green@v1", "b": "blue@v2"}),
        vote(3, voter="ben", models={"a": "blue@v3", "b": "red@v1"}),
    ]

    found = load(rows, f"votes:{asked}")

    assert numbers(found) == taken


def test_what_was_not_asked_for_is_counted(load):
    found = load([vote(0), vote(1, mode="named")], "votes:mode=blind")

    assert found.dropped == {"vote: not mode=blind": 1}


def test_a_filter_that_leaves_nothing_names_itself_and_what_there_is(load):
    rows = [vote(0, mode="named"), vote(1, mode="named", voter="")]

    with pytest.raises(DataError) as caught:
        load(rows, "votes:mode=blind,since=2026-11-01")

    message = str(caught.value)
    assert "none of 2 votes is mode=blind,since=2026-11-01" in message
    assert "mode named 2" in message
    assert "voter ann 1, none 1" in message
    assert "red@v1 2" in message
    assert "from 2026-11-01 10:00 to 2026-11-02 10:00" in message


def test_a_date_that_is_none_is_a_usage_error(load):
    with pytest.raises(UsageError, match="since=yesterday: is no date"):
        load([vote(0)], "votes:since=yesterday")


def test_filters_are_for_votes_alone(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}) + "\n")

    with pytest.raises(UsageError, match="asked for voter, which only votes have; these rows are preference"):
        load_records(f"{pairs}:voter=ann")


def test_a_file_of_votes_is_taken_like_the_registrys(tmp_path):
    file = tmp_path / "exported.jsonl"
    file.write_text("".join(json.dumps(vote(number)) + "\n" for number in range(3)))

    assert numbers(load_records(f"{file}:since=2026-11-02", view="preference")) == ["v1", "v2"]


def test_a_recipe_says_the_same_as_a_spec(tmp_path):
    (tmp_path / "exported.jsonl").write_text("".join(json.dumps(vote(number)) + "\n" for number in range(3)))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("source: exported.jsonl\nformat: votes\nsince: 2026-11-02\nmodels: [red, blue]\n")

    assert numbers(load_records(str(recipe), view="preference")) == ["v1", "v2"]


def test_a_copy_of_a_vote_counts_once(load):
    found = load([vote(0), vote(1), vote(0)])

    assert (numbers(found), found.dropped) == (["v0", "v1"], {"vote: seen before": 1})


@pytest.mark.parametrize("tail", ['{"id": "v9", "prom', '{"id": "v9", "prompt": "退'.encode()[:-1]])
def test_a_line_torn_by_a_power_cut_is_left_out_and_told(load, tail):
    found = load([vote(0), vote(1)], tail=tail)

    assert numbers(found) == ["v0", "v1"]
    assert any("line 3 is torn off at the end of the file" in note for note in found.notes)


def test_a_line_broken_in_the_middle_is_an_error(load):
    with pytest.raises(DataError, match=r"shard\.jsonl:2 row: is not valid JSON"):
        load([vote(0)], tail='{"id": "v9", "prom\n' + json.dumps(vote(1)) + "\n")


def test_an_answer_stopped_early_teaches_only_on_request(load):
    rows = [vote(0), vote(1, truncated=True)]

    assert load(rows).dropped == {"vote: an answer was stopped early (truncated=keep takes them)": 1}
    assert numbers(load(rows, "votes:truncated=keep")) == ["v0", "v1"]


def test_one_by_one_the_better_answer_is_good_and_two_bad_ones_are_bad(load):
    found = load([vote(0, "a"), vote(1, "b"), vote(2, "bad"), vote(3, "tie")], view="unpaired")

    assert answers(found) == [
        ("first 0", True),
        ("second 0", False),
        ("first 1", False),
        ("second 1", True),
        ("first 2", False),
        ("second 2", False),
    ]
    assert found.dropped == {"tie": 1}


def test_policies_leave_out_two_bad_answers_and_take_ties(load):
    found = load([vote(0, "bad"), vote(1, "tie")], "votes:both_bad=drop,ties=half", view="unpaired")

    assert answers(found) in ([("first 1", True)], [("second 1", True)])
    assert found.dropped == {"vote: both bad": 1}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("best 0", [("p0", True), ("p1", False), ("p2", False)]),
        ("best 2", [("p0", False), ("p2", True), ("p1", False)]),
        ("bad", [("p0", False), ("p1", False), ("p2", False)]),
    ],
)
def test_a_vote_on_three_answers_tells_each_answer_once(load, choice, expected):
    pairs = [(0, 1), (0, 2), (1, 2)]
    if choice.startswith("best"):
        best = int(choice[-1])
        pairs = [pair for pair in pairs if best in pair]
    rows = []
    for one, other in pairs:
        said = choice if choice == "bad" else "a" if best == one else "b"
        sides = {"a": [assistant(f"p{one}")], "b": [assistant(f"p{other}")]}
        rows.append(vote(0, said, id=f"v-{one}{other}", sides={"a": one, "b": other}, **sides))

    assert answers(load(rows, view="unpaired")) == expected


def test_two_parts_share_no_prompt_and_leave_none_out(load):
    rows = [vote(number % 20, "a", id=f"v{number}", b=[assistant(str(number))]) for number in range(60)]

    train, test = (load(rows, f"votes:part={part},test_share=0.3") for part in ("train", "test"))

    prompts = [{record.prompt[0]["content"] for record in side.records} for side in (train, test)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == 20
    assert train.rows + test.rows == 60
    assert 2 <= len(prompts[1]) <= 12
