"""`align arena`: stats, export and import, on files as the page writes them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest

from align.arena.__main__ import main
from align.arena.votes import VoteStore, read_votes
from align.data import load_records
from align.schema import assistant, user


def vote(number: int, choice: str, first: str = "red@v1", second: str = "blue@v2", **more) -> dict:
    row = {"id": f"{number:032x}-ab", "prompt": [user(f"Question {number // 2}")], "choice": choice}
    row |= {"a": [assistant(f"first {number}")], "b": [assistant(f"second {number}")]}
    row |= {"models": {"a": first, "b": second}, "mode": "blind", "voter": "ann", "reason": "", "tags": []}
    row |= {"scores": {"a": 1.0 if number % 3 else 0.0, "b": 0.5}, "truncated": False, "turn": 0, "seed": number}
    return row | {"time": f"2026-11-{number % 27 + 1:02}T10:00:00.000+00:00"} | more


CHOICES = ("a", "a", "b", "tie", "b")


@pytest.fixture
def registry(tmp_path):
    rows = [
        vote(
            number,
            ("a", "a", "b", "tie", "b")[number % 5],
            *(("red@v1", "blue@v2") if number % 2 else ("blue@v2", "red@v1")),
        )
        for number in range(40)
    ]
    VoteStore(tmp_path / "registry" / "votes").append(rows)
    return tmp_path / "registry"


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_stats_print_the_board_the_matrix_and_what_else_there_is_to_know(registry, capsys):
    code, told, _ = run(capsys, "stats", "--registry", registry)

    assert code == 0
    assert told.startswith("40 votes on 20 prompts\n")
    assert "red@v1" in told
    assert "won/tied/lost against" in told
    assert "answer on the left preferred among equals" in told
    assert "the reward model agrees with" in told


def test_stats_as_json_hold_the_whole_board(registry, capsys):
    code, told, _ = run(capsys, "stats", "--registry", registry, "--json", "--ties", "davidson")

    board = json.loads(told)
    assert code == 0
    assert board["votes"] == 40
    assert {one["reference"] for one in board["standings"]} == {"red@v1", "blue@v2"}
    assert sum(board["matrix"]["red@v1"]["blue@v2"].values()) == 40


def test_stats_as_json_hold_the_warnings_as_text(tmp_path, capsys):
    VoteStore(tmp_path / "votes").append([vote(0, "a")])

    code, told, _ = run(capsys, "stats", tmp_path / "votes", "--json")

    assert code == 0
    assert any(warning.startswith("not enough votes to place") for warning in json.loads(told)["warnings"])


def test_few_votes_are_said_to_be_few(tmp_path, capsys):
    VoteStore(tmp_path / "votes").append([vote(0, "a")])

    code, told, _ = run(capsys, "stats", tmp_path / "votes")

    assert code == 0
    assert "not enough votes" in told
    assert "warning: not enough votes to place red@v1, blue@v2" in told


def test_a_torn_line_is_told(registry, capsys):
    with next((registry / "votes").iterdir()).open("a") as shard:
        shard.write('{"id": "torn')

    code, told, _ = run(capsys, "stats", "--registry", registry)

    assert code == 0
    assert "line 41 is torn off" in told


@pytest.mark.parametrize("arguments", [[], ["--mode", "blind"]])
def test_no_votes_end_with_3_and_the_way_to_some(tmp_path, capsys, arguments):
    code, _, complaint = run(capsys, "stats", "--registry", tmp_path, *arguments)

    assert code == 3
    assert "vote on the page of `align compare` first" in complaint


def test_a_filter_without_votes_ends_with_3_and_names_what_there_is(registry, capsys):
    code, _, complaint = run(capsys, "stats", "--registry", registry, "--voter", "ben")

    assert code == 3
    assert "none of 40 votes is voter=ben" in complaint
    assert "voter ann 40" in complaint


def test_a_date_that_is_none_ends_with_2(registry, capsys):
    assert run(capsys, "stats", "--registry", registry, "--since", "soon")[0] == 2


def test_exported_pairs_are_data_any_preference_stage_takes(registry, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"

    code, told, left_out = run(capsys, "export", "--registry", registry, "--format", "trl", "--out", out)

    assert (code, left_out) == (0, "left out 8: tie\n")
    assert "32 pairs" in told
    pairs = load_records(str(out), view="preference")
    votes = load_records("votes", view="preference", roots={"registry": registry})
    assert [(one.prompt, one.chosen, one.rejected) for one in pairs.records] == [
        (one.prompt, one.chosen, one.rejected) for one in votes.records
    ]


def test_a_table_runs_no_formula_and_keeps_line_ends(tmp_path, capsys):
    rows = [vote(0, "a", a=[assistant("=HYPERLINK(1)\nsecond line")], reason="short, clear", tags=["clear", "helpful"])]
    VoteStore(tmp_path / "votes").append(rows)

    code, told, _ = run(capsys, "export", tmp_path / "votes", "--format", "csv")

    [row] = csv.DictReader(io.StringIO(told))
    assert code == 0
    assert row["answer_a"] == "'=HYPERLINK(1)\nsecond line"
    assert (row["model_b"], row["reason"], row["tags"]) == ("blue@v2", "short, clear", "clear, helpful")


def test_an_export_replaces_nothing_unasked(registry, tmp_path, capsys):
    out = tmp_path / "votes.jsonl"
    out.write_text("mine")

    assert run(capsys, "export", "--registry", registry, "--out", out)[0] == 2
    assert out.read_text() == "mine"
    assert run(capsys, "export", "--registry", registry, "--out", out, "--force")[0] == 0
    assert len(out.read_text().splitlines()) == 40


def test_votes_come_back_once_however_often_they_are_imported(registry, tmp_path, capsys):
    out, other = tmp_path / "votes.jsonl", tmp_path / "other"
    run(capsys, "export", "--registry", registry, "--out", out, "--since", "2026-11-05")
    before = [row for row in read_votes(registry / "votes") if row["time"] >= "2026-11-05"]

    assert "32 votes added, 0 were here already" in run(capsys, "import", out, "--registry", other)[1]
    assert "0 votes added, 32 were here already" in run(capsys, "import", out, "--registry", other)[1]
    assert "0 votes added, 32 were here already" in run(capsys, "import", out, "--registry", registry)[1]
    assert read_votes(other / "votes") == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"id": ""}, "id: is missing"),
        ({"models": {"a": "red@v1"}}, "models: does not name both"),
        ({"time": "long ago"}, "time: is missing"),
        ({"choice": "c"}, "choice: is 'c'"),
        ({"review": {"key": "mine"}}, "review: is {'key': 'mine'}"),
        ({"prompt": []}, "prompt"),
        ({"choice": "b"}, "is another vote"),
    ],
)
def test_a_file_with_a_line_that_is_no_vote_adds_nothing(registry, tmp_path, capsys, change, complaint):
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (vote(99, "a"), vote(0, "a") | change)))

    code, _, told = run(capsys, "import", file, "--registry", registry)

    assert code == 3
    assert f"{file}: 1 of 2 lines are no votes; none was imported" in told
    assert f"{file}:2 " in told
    assert complaint in told
    assert len(read_votes(registry / "votes")) == 40


def test_help_needs_neither_torch_nor_gradio_nor_numpy():
    script = (
        "import sys; from align.arena.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'gradio', 'numpy', 'transformers'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300).returncode == 0
