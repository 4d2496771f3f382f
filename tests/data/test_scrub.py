from __future__ import annotations

import json

import pytest

from align.data import load_records
from align.data.__main__ import main
from align.data.scrub import Scrubber, passes_iban, passes_luhn


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("write to ann.lee+x@mail.example.co.uk, please", "write to <email>, please"),
        ("card 4111 1111 1111 1111!", "card <card>!"),
        ("card 5500-0000-0000-0004.", "card <card>."),
        ("IBAN DE89 3704 0044 0532 0130 00 it is", "IBAN <iban> it is"),
        ("GB82WEST12345698765432", "<iban>"),
        ("call +49 30 1234567 today", "call <phone> today"),
        ("call (212) 555-0187 or 212-555-0187", "call <phone> or <phone>"),
        ("手机13812345678，邮箱a@b.example。", "手机<phone>，邮箱<email>。"),
        ("电话 138 1234 5678 和 010-62781234", "电话 <phone> 和 <phone>"),
        ("token hf_" + "aB3" * 11 + " leaked", "token <secret> leaked"),
        ("key sk-proj-" + "aB3_" * 8, "key <secret>"),
        ("two@a.example three@b.example", "<email> <email>"),
    ],
)
def test_personal_data_becomes_placeholders(text, clean):
    assert Scrubber().scrub_value(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112 fails the Luhn check",
        "0000 0000 0000 0000 is one digit",
        "DE89 3704 0044 0532 0130 02 is no IBAN",
        "on 2023-05-17 at 12:30:45, version 1.10.2024",
        "pi is 3.14159265358979323846",
        "between 1990-1995 there were 12,000,000 of them",
        "a @decorator and an x@y address",
        "hf_hub_download and sk-learn and risk-taking",
        "1 2 3 4 5 6 7 8 9 10 11 12",
        "中文没有数字",
    ],
)
def test_what_is_no_personal_data_stays(text):
    assert Scrubber().scrub_value(text) == text


def test_check_digits_by_the_published_examples():
    assert passes_luhn("79927398713")
    assert not passes_luhn("79927398710")
    assert passes_iban("GB82 WEST 1234 5698 7654 32")
    assert not passes_iban("GB82 WEST 1234 5698 7654 33")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": "bob@example.com"}}}
    rows = [
        {"messages": [{"role": "user", "content": "I am ann@example.com"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "plain"}, {"role": "assistant", "content": "text"}]},
        {
            "messages": [
                {"role": "user", "content": "mail bob@example.com, call +49 30 1234567"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ],
            "author": "cy@example.com",
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_report_counts_by_kind_and_changes_nothing(source, capsys):
    before = source.read_bytes()

    assert main(["scrub", str(source)]) == 0

    told = capsys.readouterr().out
    assert "3 rows, 2 of them hold what may be personal or secret" in told
    assert f"email         4 in 2 rows; first {source}:1: 'ann@example.com'" in told
    assert "phone         1 in 1 rows" in told
    assert "card" not in told.replace("cards", "")
    assert source.read_bytes() == before


def test_a_copy_keeps_every_row_and_hides_the_data_everywhere(source, tmp_path, capsys):
    out = tmp_path / "clean.jsonl"

    assert main(["scrub", str(source), "--out", str(out)]) == 0

    assert "3 rows, 2 of them changed" in capsys.readouterr().out
    assert "@example.com" not in out.read_text()
    records = load_records(str(out)).records
    assert [len(record.completion) for record in records] == [1, 1, 1]
    assert records[2].prompt[0]["content"] == "mail <email>, call <phone>"
    assert records[2].completion[0]["tool_calls"][0]["function"]["arguments"] == {"to": "<email>"}
    assert records[2].meta == {"author": "<email>"}


def test_a_file_that_is_there_is_not_replaced(source, tmp_path, capsys):
    (tmp_path / "clean.jsonl").write_text("mine")

    assert main(["scrub", str(source), "--out", str(tmp_path / "clean.jsonl")]) == 2
    assert "there already" in capsys.readouterr().err
    assert (tmp_path / "clean.jsonl").read_text() == "mine"


def test_the_known_counts_of_a_real_file(real_data, capsys):
    assert main(["scrub", str(real_data / "text/llamafactory_demo__c4_demo.jsonl")]) == 0

    told = capsys.readouterr().out
    assert "email         7 in" in told
    assert "phone        23 in" in told
