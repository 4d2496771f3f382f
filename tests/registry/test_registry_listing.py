"""`ls`: what a version is at a glance, on wide and on narrow terminals, and the same keys for programs every time."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from align.registry import listing, text_tables
from align.registry.__main__ import main


@pytest.fixture
def filled(registry, commit):
    base = commit(registry, "base", "pretrain", "base", metrics={"loss": 2.5, "perplexity": 9.25})
    over = {"reference": base.reference, "location": base.location}
    first = commit(registry, "support-sft", base=over, parents=[{"reference": "base@v1"}], metrics={"eval_loss": 1.5})
    link = {"reference": first.reference, "digest": first.digest}
    commit(registry, "judge", "reward", "reward", base=over, parents=[link], metrics={"loss": 0.5, "accuracy": 0.875})
    registry.set_alias("support-sft", "best", 1)
    return registry


def _ls(registry, capsys, *words):
    assert main(["ls", *words, "--registry", str(registry.root)]) == 0
    return capsys.readouterr().out


def test_a_wide_terminal_shows_everything(filled, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    lines = _ls(filled, capsys).splitlines()

    assert lines[0].split() == ["reference", "aliases", "stage", "kind", "from", "base", "metric", "age", "size"]
    assert lines[1].split() == [
        "base@v1",
        "latest",
        "pretrain",
        "base",
        "-",
        "-",
        "perplexity",
        "9.25",
        "now",
        "87",
        "B",
    ]
    assert "accuracy 0.875" in lines[2]
    assert lines[3].startswith("support-sft@v1  best, latest  sft       policy  base@v1         base@v1  eval_loss 1.5")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100])
def test_a_narrow_terminal_keeps_reference_and_number(filled, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))

    lines = _ls(filled, capsys).splitlines()

    assert max(map(len, lines)) <= width
    assert lines[2].split()[0] == "judge@v1"
    assert "metric" not in lines[0] or "0.875" in lines[2]


def test_one_name_alone(filled, capsys):
    assert [line.split()[0] for line in _ls(filled, capsys, "judge").splitlines()] == ["reference", "judge@v1"]
    assert main(["ls", "jugde", "--registry", str(filled.root)]) == 4
    assert "did you mean judge?" in capsys.readouterr().err


def test_the_keys_for_programs_are_these(filled, capsys):
    rows = json.loads(_ls(filled, capsys, "--json"))

    assert [list(row) for row in rows] == [
        [
            "reference", "name", "version", "aliases", "kind", "stage", "parents", "base", "main_metric", "metrics",
            "created", "size", "digest", "location", "evaluation",
        ]
    ] * 3  # fmt: skip
    assert rows[1]["main_metric"] == {"name": "accuracy", "value": 0.875}
    assert (rows[2]["name"], rows[2]["version"], rows[2]["aliases"]) == ("support-sft", 1, ["best", "latest"])
    assert (rows[2]["base"], rows[2]["parents"]) == ("base@v1", ["base@v1"])


def test_a_version_without_numbers_has_none(registry, commit):
    assert listing.main_metric(commit(registry, "m")) is None
    assert listing.main_metric(commit(registry, "m", metrics={"odd": 3})) == ("odd", 3)


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ({"completion_length": 9.0, "kl": 0.1, "score_mean": 1.5}, "score_mean"),  # PPO
        ({"kl": 0.1, "loss": 0.2, "reward": 0.9}, "reward"),  # GRPO
        ({"kl": 0.1, "loss": 0.4, "rewards/margins": 0.5}, "rewards/margins"),  # KTO
        ({"eval_accuracy": 0.8, "held_out_accuracy": 0.81, "loss": 0.3}, "held_out_accuracy"),  # reward model
        ({"eval_loss": 0.5, "loss": 0.4, "perplexity": 1.8}, "perplexity"),
    ],
)
def test_the_number_shown_is_what_the_stage_is_after(registry, commit, metrics, name):
    assert listing.main_metric(commit(registry, "m", metrics=metrics)) == (name, metrics[name])


@pytest.mark.parametrize(
    ("created", "age"),
    [
        ("2026-03-01T12:00:00+00:00", "now"),
        ("2026-03-01T11:59:30+00:00", "now"),
        ("2026-03-01T11:15:00+00:00", "45 min"),
        ("2026-03-01T02:00:00+00:00", "10 h"),
        ("2026-02-01T12:00:00", "28 d"),
        ("2027-01-01T00:00:00+00:00", "now"),
        ("yesterday", "yesterday"),
    ],
)
def test_ages_are_said_as_people_say_them(created, age):
    assert text_tables.format_age(created, datetime(2026, 3, 1, 12, tzinfo=UTC)) == age


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (14_000_000_000, "14.0 GB")])
def test_sizes_are_said_in_powers_of_a_thousand(count, said):
    assert text_tables.format_size(count) == said


def test_wide_characters_take_two_columns():
    assert text_tables.format_table([("中文", "x"), ("abcde", "y")]) == "中文   x\nabcde  y"


def test_long_facts_are_continued_below_themselves():
    drawn = text_tables.format_facts([("short", "one two"), ("a longer key", "word " * 20)], 50)

    assert drawn.splitlines()[0] == "short         one two"
    assert drawn.splitlines()[2].startswith(" " * 14 + "word")
    assert max(map(len, drawn.splitlines())) <= 50
