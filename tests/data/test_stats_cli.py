from __future__ import annotations

import json
import subprocess
import sys

import pytest

from align.data.__main__ import main
from align.data.stats import summarise_lengths

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "over there"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbers(capsys, *options):
    assert main(["stats", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_of_conversations(tmp_path, capsys):
    rows = [{"messages": CHAT}, {"messages": CHAT[1:] * 2}, {"messages": CHAT}]

    found = numbers(capsys, write(tmp_path / "a.jsonl", rows))

    assert (found["rows"], found["records"], found["kinds"]) == (3, 3, {"demonstration": 3})
    assert found["roles"] == {"user": 4, "assistant": 4, "system": 2}
    assert (found["with_system"], found["repeated"], found["prompts"]) == (2, 1, 2)
    assert found["turns"] == {"total": 10, "mean": 3.3, "p50": 3, "p90": 4, "p99": 4, "min": 3, "max": 4}
    assert found["answer_characters"]["max"] == len("over there" * 2 + "the fox")
    assert found["digest"].startswith("sha256:")
    assert "tokens" not in found


def test_scripts_are_shares_of_the_letters(tmp_path, capsys):
    found = numbers(capsys, write(tmp_path / "a.jsonl", [{"text": "abcd 你好吗啊 да 1234 !?"}]))

    assert found["scripts"] == {"Latin": 0.4, "Han": 0.4, "Cyrillic": 0.2}


def test_pairs_and_labels_show_their_lean(tmp_path, capsys):
    pairs = [{"prompt": f"q{n}", "chosen": "long answer", "rejected": "short"} for n in range(40)]
    labels = [{"prompt": f"q{n}", "completion": "a", "label": n > 0} for n in range(9)]

    pair = numbers(capsys, write(tmp_path / "p.jsonl", pairs))
    label = numbers(capsys, write(tmp_path / "l.jsonl", labels))

    assert (pair["chosen_longer"], pair["rejected_longer"]) == (40, 0)
    assert any("chosen is longer in 40 of 40 pairs" in remark for remark in pair["remarks"])
    assert (label["labelled_good"], label["labelled_bad"]) == (8, 1)


def test_the_table_is_plain_and_aligned(tmp_path, capsys):
    assert main(["stats", write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 2)]) == 0

    lines = capsys.readouterr().out.splitlines()
    table = [
        line for line in lines if line.startswith(("  turns", "  prompt characters", "  answer characters", "   "))
    ]
    assert lines[0].startswith("a.jsonl: 2 rows read, 2 records, sha256:")
    assert len({len(line) for line in table}) == 1
    assert "  records             2 demonstration" in lines
    assert any(line.startswith("  warning: 1 rows repeat") for line in lines)


def test_tokens_are_counted_as_a_model_makes_them(tmp_path, tiny_base, capsys):
    data = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:] * 20}])
    model = ["--model", str(tiny_base), "--registry", str(tmp_path / "registry"), "--max-length", "64"]

    found = numbers(capsys, data, *model)

    assert 0 < found["trained_tokens"]["total"] < found["tokens"]["total"]
    assert found["longer_than_max_length"] == 1
    assert found["tokens"]["max"] > 64
    assert main(["stats", data, *model]) == 0
    assert "too long            1 rows have more than 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "the lazy dog"}, {"tokens"}),
        ({"prompt": "the fox"}, {"prompt_tokens"}),
        ({"prompt": "the fox", "chosen": "a", "rejected": "b"}, {"prompt_tokens", "chosen_tokens", "rejected_tokens"}),
        ({"prompt": "the fox", "completion": "a", "label": True}, {"tokens", "trained_tokens"}),
    ],
)
def test_every_kind_has_its_tokens(tmp_path, tiny_base, capsys, row, columns):
    model = ["--model", str(tiny_base), "--registry", str(tmp_path / "registry")]

    found = numbers(capsys, write(tmp_path / "a.jsonl", [row] * 3), *model)

    assert {key for key in found if key.endswith("tokens")} == columns
    assert all(found[column]["total"] >= 3 for column in columns)


def test_percentiles_are_nearest_ranks():
    spread = summarise_lengths(range(1, 101))

    assert {key: spread[key] for key in ("p50", "p90", "p99", "mean")} == {
        "p50": 50,
        "p90": 90,
        "p99": 99,
        "mean": 50.5,
    }
    assert summarise_lengths([]) == {}


def test_bad_rows_are_errors_unless_they_are_to_be_counted(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": ""}])

    assert main(["stats", data]) == 3
    assert "a.jsonl:2 text: is empty" in capsys.readouterr().err
    assert main(["stats", data, "--on-bad-row", "skip"]) == 0
    assert "1  empty text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stats", "gsm8"], 3, "did you mean gsm8k"),
        (["stats", "nothere.jsonl"], 3, "no such file"),
        (["check", "nothere.jsonl"], 3, "no such file"),
        (["scrub", "nothere.jsonl"], 3, "no such file"),
        (["split", "nothere.jsonl", "--out", "x", "--eval", "0.1"], 3, "no such file"),
    ],
)
def test_data_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)

    assert main(arguments) == code

    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert list(tmp_path.rglob("*.part")) == []


def test_check_finds_a_leak_and_tells_warnings(tmp_path, capsys):
    rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(5)]
    train, held_out = write(tmp_path / "t.jsonl", rows), write(tmp_path / "e.jsonl", [rows[2], rows[2]])
    clean = write(tmp_path / "c.jsonl", [{"instruction": "other", "output": "x"}])

    assert main(["check", held_out, "--against", train]) == 3
    told = capsys.readouterr()
    assert main(["check", clean, "--against", train]) == 0

    assert "warning: 1 rows repeat an earlier row exactly" in told.out
    assert f"2 of its 2 rows are in {train} too ({held_out}:1 is {train}:3" in told.err


def test_a_mixture_works_with_every_command(tmp_path, capsys):
    write(tmp_path / "a.jsonl", [{"instruction": f"a{n}", "output": "x"} for n in range(60)])
    write(tmp_path / "b.jsonl", [{"instruction": f"b{n}", "output": "x"} for n in range(60)])
    (tmp_path / "m.yaml").write_text("mix: [{name: a.jsonl, weight: 1}, {name: b.jsonl, weight: 1}]\n")
    data, out = str(tmp_path / "m.yaml"), str(tmp_path / "out.jsonl")

    assert main(["check", data]) == 0
    assert "m: 120 rows read, 0 bad; gives 120 demonstration" in capsys.readouterr().out
    assert numbers(capsys, data)["records"] == 120
    assert main(["convert", data, "--out", out]) == 0
    assert main(["split", data, "--out", str(tmp_path / "s"), "--eval", "0.3"]) == 0
    assert main(["scrub", data]) == 0


def test_list_is_aligned_and_has_json(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)

    assert len(rows) == len(lines)
    width = max(len(row["name"]) for row in rows)
    assert [line[: width + 2] for line in lines] == [row["name"].ljust(width + 2) for row in rows]
    assert {"name", "format", "language", "license", "source", "description"} == set(rows[0])


@pytest.mark.parametrize("command", ["check", "stats", "scrub", "list"])
def test_a_terminal_without_the_characters_gets_escapes(tmp_path, command):
    rows = [{"instruction": "你好 a@b.example", "output": "{{name}}\ufffd"}, {"instruction": "é"}]
    data = write(tmp_path / "数据.jsonl", rows)
    arguments = [command] if command == "list" else [command, data]
    arguments += ["--on-bad-row", "skip"] if command in ("stats", "scrub") else []

    done = subprocess.run(
        [sys.executable, "-m", "align.data", *arguments],
        capture_output=True,
        env={"PYTHONIOENCODING": "latin-1", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        timeout=300,
    )

    assert done.returncode == (3 if command == "check" else 0), done.stderr
    assert b"Traceback" not in done.stderr
    assert command == "list" or b"\\u6570\\u636e" in done.stdout
