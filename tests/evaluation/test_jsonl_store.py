"""An evaluation that was killed goes on where it stopped, and takes over nothing that another model would write."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine

from align.engine.protocol import Row, Sampling
from align.errors import IntegrityError
from align.evaluate import main
from align.evaluation.completions import generate_completions, row_key
from align.evaluation.jsonl_store import JsonlStore, open_completion_store
from align.models import tokenizers
from align.models.loading import Precision
from align.schema import Record, user

KILLED = """
import os, signal, sys
from align.evaluate import main
from align.evaluation.jsonl_store import JsonlStore

add, calls = JsonlStore.add, []
def cut(self, *row):
    add(self, *row)
    calls.append(row)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
JsonlStore.add = cut
main(sys.argv[1:])
"""
FP32 = Precision(bf16=False)
GREEDY, WARM = Sampling(0.0), Sampling(1.0)


def test_after_a_kill_the_same_command_goes_on_and_gives_what_an_undisturbed_one_gives(
    family, questions, tmp_path, capsys
):
    held = family.cache_dir / "completions"
    shutil.rmtree(held, ignore_errors=True)
    words = ["red", "blue", "--data", str(questions), "--registry", str(family.root), "--max_new_tokens", "12"]
    words += ["--temperature", "0.8", "--scorer", "token_f1", "--no_record", "--no_kl", "--samples"]

    killed = subprocess.run([sys.executable, "-c", KILLED, *words, str(tmp_path / "none")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    newest = max(held.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    with newest.open("ab") as file:
        file.write(b'\n{"key": "torn off by a power c')
    capsys.readouterr()

    assert main([*words, str(tmp_path / "resumed.jsonl")]) == 0
    resumed = capsys.readouterr().err
    shutil.rmtree(held)
    assert main([*words, str(tmp_path / "undisturbed.jsonl")]) == 0
    undisturbed = capsys.readouterr().err

    told = "7 of 24 completions of red@v1, blue@v1 are reused from an earlier evaluation"
    assert f"{told}; delete {held} to generate them again\n" in resumed
    assert "earlier evaluation" not in undisturbed
    texts = {(tmp_path / f"{name}.jsonl").read_text() for name in ("resumed", "undisturbed")}
    assert len(texts) == 1


@pytest.fixture(scope="module")
def where(family, tmp_path_factory):
    """The name of the file that holds what a model wrote, for whatever may change."""
    from align.models.adapters import load_models

    loaded = load_models(family, ["red", "blue"], FP32)

    def name(model="red", sampling=GREEDY, precision=FP32):
        return open_completion_store(
            loaded, family.resolve(model), sampling, precision, tmp_path_factory.getbasetemp()
        ).path

    return SimpleNamespace(name=name, loaded=loaded)


def test_another_model_sampling_arithmetic_or_template_has_a_file_of_its_own(where, monkeypatch):
    first = where.name()
    names = [
        first,
        where.name("blue"),
        where.name("base"),
        where.name(sampling=replace(GREEDY, max_new_tokens=9)),
        where.name(sampling=replace(GREEDY, top_p=0.5)),
        where.name(sampling=WARM),
        where.name(precision=Precision(bf16=True)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(where.loaded.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
        names.append(where.name())
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "read_listed_stops", lambda _base: ("generation_config.json", [2, 5], None))
        names.append(where.name())

    assert len(set(names)) == len(names)
    assert where.name() == first


def test_a_row_is_its_conversation_and_the_seed_where_one_is_used():
    row = Row("m", [user("hello")], 3)

    assert row_key(row, WARM) != row_key(replace(row, seed=4), WARM)
    assert row_key(row, GREEDY) == row_key(replace(row, seed=4), GREEDY)
    assert row_key(row, GREEDY) != row_key(replace(row, messages=[user("hello!")]), GREEDY)


def test_conversations_go_on_in_the_middle(tmp_path):
    records = [Record(prompt=[user("one")], meta={"follow_ups": ["two", "three"]}), Record(prompt=[user("alone")])]
    asked = []

    def reply(row):
        asked.append(row.messages[-1]["content"])
        return f"to {asked[-1]}"

    engine = FakeEngine(["m"], reply)
    kept = tmp_path / "m.jsonl"
    whole, _ = generate_completions(engine, ["m"], records, GREEDY, stores={"m": JsonlStore(kept)})
    lines = [line for line in kept.read_text().splitlines() if line and "to three" not in line]
    kept.write_text("\n".join(lines))
    asked.clear()

    again, _ = generate_completions(engine, ["m"], records, GREEDY, stores={"m": JsonlStore(kept)})

    assert asked == ["three"]
    assert again == whole


def test_damage_costs_the_damaged_rows_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    JsonlStore(path).add("a", {"n": 1})
    path.write_bytes(path.read_bytes() + b'[]\n7\n\x00\x00{"key": "torn')
    JsonlStore(path).add("b", {"n": 2})

    found = JsonlStore(path)

    assert (found.find("a"), found.find("b"), found.find("torn")) == ({"n": 1}, {"n": 2}, None)


def test_a_disk_that_takes_nothing_does_not_stop_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    kept = JsonlStore(tmp_path / "file" / "rows.jsonl")

    kept.add("a", {})
    kept.add("b", {})

    assert capsys.readouterr().err.count("the evaluation goes on") == 1


def test_when_every_row_fails_the_first_reason_is_raised(tmp_path):
    engine = FakeEngine(["m"], lambda row: None)
    records = [Record(prompt=[user("hello")])]

    with pytest.raises(IntegrityError, match="no reply"):
        generate_completions(engine, ["m"], records, GREEDY, stores={"m": JsonlStore(tmp_path / "m.jsonl")})
    assert list(tmp_path.iterdir()) == []
