from __future__ import annotations

import json

import pytest

from align.data import load_records
from align.data.catalog import MixtureDataset, MixtureMember, find_dataset, source_datasets
from align.data.mixtures import interleave, share_rows
from align.errors import DataError, UsageError
from align.schema import Record


@pytest.fixture
def sets(tmp_path):
    """Three sets in a folder: 60 demonstrations, 20 demonstrations, 10 pairs."""
    for name, count in (("large", 60), ("small", 20)):
        rows = [{"instruction": f"{name} {n}", "output": "yes"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"pair {n}", "chosen": "yes", "rejected": "no"} for n in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


def mix(folder, text, name="mymix"):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def asked(found):
    return [record.prompt[-1]["content"] for record in found.records]


def test_weights_are_shares_of_the_mixed_rows_and_the_first_set_to_run_out_ends_it(sets):
    spec = mix(sets, "mix: [{name: large.jsonl, weight: 3}, {name: small.jsonl, weight: 2}]")

    found = load_records(spec)

    names = [text.split()[0] for text in asked(found)]
    assert (names.count("large"), names.count("small")) == (30, 20)
    assert len(set(asked(found))) == 50
    assert any("mixes 30 of large.jsonl (60), 20 of small.jsonl (20)" in note for note in found.notes)


def test_rows_are_interleaved_from_the_start(sets):
    found = load_records(mix(sets, "mix: [{name: large.jsonl, weight: 2}, {name: small.jsonl, weight: 1}]"))

    for start in range(0, 60, 6):
        names = [text.split()[0] for text in asked(found)[start : start + 6]]
        assert (names.count("large"), names.count("small")) == (4, 2)


def test_a_seed_draws_other_rows_and_the_same_seed_the_same(sets):
    text = "mix: [{name: large.jsonl, weight: 1}, {name: small.jsonl, weight: 1}]\n"
    plain, one, again, other = (
        load_records(mix(sets, text + extra)) for extra in ("", "seed: 1", "seed: 1", "seed: 2")
    )

    assert asked(plain)[:4] == ["large 0", "small 0", "large 1", "small 1"]
    assert one.digest == again.digest
    assert len({plain.digest, one.digest, other.digest}) == 3
    assert {text.split()[0] for text in asked(one)[:10]} == {"large", "small"}


def test_rows_repeat_only_when_asked(sets):
    text = "mix: [{name: large.jsonl}, {name: small.jsonl}]\nstopping: all_exhausted\n"

    found = load_records(mix(sets, text))

    assert found.rows == 120
    assert all(asked(found).count(f"large {n}") == 1 for n in range(60))
    assert all(asked(found).count(f"small {n}") == 3 for n in range(20))
    assert any("40 rows repeat an earlier row exactly" in note for note in found.notes)


def test_a_number_of_rows_is_given_or_refused_with_the_most_there_could_be(sets):
    text = "mix: [{name: large.jsonl, weight: 3}, {name: small.jsonl, weight: 1}]\nrows: %d\n%s"

    assert load_records(mix(sets, text % (20, ""))).rows == 20
    assert load_records(mix(sets, text % (100, "stopping: all_exhausted"))).rows == 100
    with pytest.raises(DataError, match=r"mymix: rows: 100 rows need 75 of large.jsonl, which has 60; ask for 80 at"):
        load_records(mix(sets, text % (100, "")))


def test_a_limit_keeps_the_proportions(sets):
    spec = mix(sets, "mix: [{name: large.jsonl, weight: 3}, {name: small.jsonl, weight: 1}]")

    names = [text.split()[0] for text in asked(load_records(f"{spec}:limit=8"))]

    assert (names.count("large"), names.count("small")) == (6, 2)


def test_the_manifest_lists_the_members(sets):
    spec = mix(sets, "mix: [{name: 'large.jsonl:limit=30', weight: 1}, {name: small.jsonl, weight: 1}]")

    held = load_records(spec).describe()

    alone = load_records(str(sets / "small.jsonl"))
    assert held["name"] == "mymix"
    assert [member["name"] for member in held["members"]] == ["large.jsonl:limit=30", "small.jsonl"]
    assert held["members"][1] == {"name": "small.jsonl", "digest": alone.digest, "rows": 20, "of": 20}


def test_several_datasets_are_listed_as_members_too(sets):
    held = load_records([str(sets / "large.jsonl"), str(sets / "small.jsonl")]).describe()

    assert [(member["name"], member["rows"]) for member in held["members"]] == [
        ("large.jsonl", 60),
        ("small.jsonl", 20),
    ]
    assert "members" not in load_records(str(sets / "large.jsonl")).describe()


def test_members_are_asked_for_the_view_and_named_when_they_lack_it(sets):
    spec = mix(sets, "mix: [{name: large.jsonl}, {name: pairs.jsonl}]")

    assert load_records(spec, view="demonstration").rows == 20
    with pytest.raises(DataError, match=r"large.jsonl: asked for the view preference"):
        load_records(spec, view="preference")
    with pytest.raises(DataError, match=r"members differ in kind \(large.jsonl gives demonstration, pairs.jsonl gives"):
        load_records(spec)


def test_bad_rows_of_a_member_are_errors_or_counted(sets):
    with (sets / "small.jsonl").open("a") as file:
        file.write('{"instruction": "q", "output": ""}\n')
    spec = mix(sets, "mix: [{name: large.jsonl}, {name: small.jsonl}]")

    with pytest.raises(DataError, match=r"small.jsonl: 1 of 21 rows cannot be used"):
        load_records(spec)
    assert load_records(spec, on_bad_row="skip").dropped == {"empty completion": 1}


def test_a_mixture_may_hold_a_mixture_but_not_itself(sets):
    mix(sets, "mix: [{name: large.jsonl}, {name: small.jsonl}]", "inner")
    outer = mix(sets, "mix: [{name: inner.yaml, weight: 3}, {name: small.jsonl, weight: 1}]", "outer")

    assert load_records(outer).rows == 53
    assert [leaf.name for leaf in source_datasets(find_dataset(outer))] == ["large.jsonl", "small.jsonl", "small.jsonl"]
    mix(sets, "mix: [{name: large.jsonl}, {name: outer.yaml}]", "inner")
    with pytest.raises(UsageError, match=r"the mixture holds itself \(outer > inner > outer\)"):
        load_records(outer)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("mix: [{name: gsm8, weight: 1}]", DataError, "mymix: member gsm8: no dataset of this name .* mean gsm8k"),
        ("mix: [{name: large.jsonl, weight: 0}]", UsageError, "mix.weight: .* give a number above 0"),
        ("mix: [{name: large.jsonl, weight: -1}]", UsageError, "mix.weight: .* give a number above 0"),
        ("mix: [{name: large.jsonl, weight: .inf}]", UsageError, "mix.weight: .*finite"),
        ("mix: [{name: large.jsonl, wieght: 1}]", UsageError, "wieght: unknown setting"),
        ("mix: [{weight: 1}]", UsageError, "name: missing"),
        ("mix: []", UsageError, "source: missing; give source: FILE or mix:"),
        ("mix: [{name: large.jsonl}]\nsource: a.jsonl", UsageError, "source: it has both"),
        ("mix: [{name: large.jsonl}]\nformat: alpaca", UsageError, "format: not for a mixture"),
        ("mix: [{name: large.jsonl}, {name: large.jsonl}]", UsageError, "large.jsonl is listed twice"),
        ("mix: [{name: large.jsonl}]\nstopping: never", UsageError, "stopping: "),
        ("mix: [{name: large.jsonl}]\nrows: 0", UsageError, "rows: "),
        ("source: large.jsonl\nrows: 5", UsageError, "rows and stopping: belong to a mixture"),
        ("mix: [{name: nothere.jsonl}]", DataError, "nothere.jsonl: no such file"),
        ("mix: [{name: large.jsonl, weight: 1}]\nmix: []", UsageError, "mymix.yaml:2 mix: written twice"),
    ],
)
def test_a_wrong_mixture_says_what_is_wrong(sets, text, error, message):
    with pytest.raises(error, match=message):
        load_records(mix(sets, text))


def test_a_weight_in_scientific_notation_is_a_number(sets):
    assert find_dataset(mix(sets, "mix: [{name: large.jsonl, weight: 1e-4}]")).config.mix[0].weight == 0.0001


@pytest.mark.parametrize(
    ("weights", "sizes", "rows", "counts"),
    [
        ((1, 1, 1), (10, 10, 10), 10, (4, 3, 3)),
        ((0.1, 0.2, 0.7), (100, 100, 100), None, (14, 29, 99)),
        ((1, 99), (5, 50), None, (1, 49)),
    ],
)
def test_shares_are_exact_to_a_row_and_never_more_than_there_are(weights, sizes, rows, counts):
    config = MixtureDataset(
        mix=[MixtureMember(name=str(n), weight=weight) for n, weight in enumerate(weights)], rows=rows
    )

    shares = share_rows(config, {str(n): size for n, size in enumerate(sizes)})

    assert tuple(shares.values()) == counts


def test_interleaving_keeps_each_sets_own_order_without_a_seed():
    sets = [[Record(id=f"{name}{n}") for n in range(9)] for name in "ab"]

    mixed = [record.id for record in interleave(sets, [9, 3], None)]

    assert [name for name in mixed if name.startswith("a")] == [f"a{n}" for n in range(9)]
    assert [name for name in mixed if name.startswith("b")] == ["b0", "b1", "b2"]
    assert all(any(name.startswith("b") for name in mixed[start : start + 4]) for start in (0, 4, 8))
