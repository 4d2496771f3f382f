"""`align evaluate` from its command line: numbers, files, records, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys

import pytest

from align.command_line import parse_options
from align.engine.protocol import Sampling
from align.errors import MachineError
from align.evaluate import build_parser, main, read_judges
from align.evaluation.request import EvaluationRequest
from align.evaluation.session import Outputs, evaluate, save_evaluation
from align.registry import evaluations, upkeep
from align.registry.__main__ import main as registry_main

FAST = ["--max_new_tokens", "12"]


@pytest.fixture
def run(family, capsys):
    """Run the command on the family; returns (exit code, stdout, stderr)."""

    def command(*words):
        code = main([*map(str, words), "--registry", str(family.root), *FAST])
        return code, *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def whole(family, questions, tmp_path_factory):
    """One evaluation of everything, as its files."""
    folder = tmp_path_factory.mktemp("whole")
    files = {name: folder / f"out.{name}" for name in ("json", "jsonl", "html")}
    code = main([
        "red", "blue", "base", "--data", str(questions), "--registry", str(family.root), *FAST, "--seed", "3",
        "--scorer", "token_f1,chrf", "--reward_model", "judge", "--rewards", "[{name: length, args: {target: 4}}]",
        "--judge", "rewards", "--json", str(files["json"]), "--samples", str(files["jsonl"]), "--report",
        str(files["html"]),
    ])  # fmt: skip
    assert code == 0
    return files


def test_every_measure_is_there_with_its_interval(whole):
    found = json.loads(whole["json"].read_text())

    assert found["headline"] == "token_f1"
    assert [model["reference"] for model in found["models"]] == ["red@v1", "blue@v1", "base@v1"]
    assert list(found["models"][1]["metrics"]) == [
        "token_f1", "chrf", "reward", "reward_model", "perplexity", "kl_parent", "kl_base", "tokens", "no_eos",
        "repetition", "refusal",
    ]  # fmt: skip
    assert {"kl_parent", "kl_base"}.isdisjoint(found["models"][2]["metrics"])
    for model in found["models"]:
        for name, number in model["metrics"].items():
            assert number["n"] == 12, name
            assert number["low"] <= number["value"] + 1e-9, name
            assert number["value"] <= number["high"] + 1e-9, name


def test_the_others_are_compared_with_the_first_and_judged_against_it(whole):
    first, second, third = json.loads(whole["json"].read_text())["models"]

    assert (first["comparison"], first["judged"]) == ({}, [])
    for model in (second, third):
        for name, found in model["comparison"].items():
            ours, theirs = model["metrics"][name]["value"], first["metrics"][name]["value"]
            assert found["difference"] == pytest.approx(ours - theirs)
            assert found["wins"] + found["ties"] + found["losses"] == 12
        assert [judged["judge"] for judged in model["judged"]] == ["judge", "rewards"]
        assert model["judged"][0]["wins"] == model["comparison"]["reward_model"]["wins"]


def test_slices_by_language_and_meta_make_up_the_whole(whole):
    for model in json.loads(whole["json"].read_text())["models"]:
        assert {column: list(values) for column, values in model["slices"].items()} == {
            "language": ["en", "zh"],
            "kind": ["easy", "hard"],
        }
        for values in model["slices"].values():
            assert sum(part["n"] for part in values.values()) == 12
            mean = sum(part["n"] * part["metrics"]["token_f1"]["value"] for part in values.values()) / 12
            assert mean == pytest.approx(model["metrics"]["token_f1"]["value"])


def test_samples_hold_every_completion_with_its_numbers(whole):
    rows = [json.loads(line) for line in whole["jsonl"].read_text().splitlines()]
    found = json.loads(whole["json"].read_text())

    assert len(rows) == 36
    for model in found["models"]:
        scores = [row["numbers"]["reward_model"] for row in rows if row["model"] == model["reference"]]
        assert sum(scores) / 12 == pytest.approx(model["metrics"]["reward_model"]["value"])


def test_completions_are_what_one_row_at_a_time_gives(whole, family):
    from align.engine.local import LocalEngine
    from align.engine.protocol import Row, Sampling
    from align.models.adapters import load_models
    from align.models.loading import Precision

    rows = [json.loads(line) for line in whole["jsonl"].read_text().splitlines()]
    engine = LocalEngine(load_models(family, ["red", "blue", "base"], Precision(bf16=False)))
    try:
        for row in rows[:9]:
            alone = engine.complete([Row(row["model"], row["prompt"])], Sampling(0.0, max_new_tokens=12))
            assert alone == [row["completion"]]
    finally:
        engine.close()


def test_numbers_are_kept_beside_versions_that_stay_whole(whole, family, capsys):
    (record,) = evaluations.read_records(family.resolve("blue"))

    assert (record["headline"]["name"], record["against"]) == ("token_f1", "red@v1")
    assert record["settings"]["sampling"] == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12}
    assert record["data"]["rows"] == 12
    assert family.verify() == []
    assert upkeep.examine(family) == []
    assert registry_main(["show", "blue", "--registry", str(family.root)]) == 0
    assert "token_f1 0." in capsys.readouterr().out


def test_the_report_needs_nothing_but_itself_and_escapes_what_models_say(whole):
    page = whole["html"].read_text(encoding="utf-8")

    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert "<script" not in page
    assert "onerror=" not in page.replace("onerror=alert(2)&gt;", "")
    assert "&lt;script&gt;alert(1)" in page
    assert "\u202e" not in page
    assert "http://" not in page
    assert "https://" not in page
    for heading in ("All numbers", "Against the first model", "Judged in pairs", "Worst examples", "Lineage"):
        assert heading in page


def test_equal_seeds_give_equal_numbers(run, questions, tmp_path):
    words = ["red", "--data", questions, "--limit", "6", "--temperature", "1", "--no_kl", "--no_record"]

    for name in ("first.json", "second.json"):
        assert run(*words, "--json", tmp_path / name)[0] == 0

    first, second = (json.loads((tmp_path / name).read_text())["models"] for name in ("first.json", "second.json"))
    assert first == second
    assert first[0]["metrics"]["tokens"]["n"] == 6


def test_labels_are_chosen_by_likelihood_and_nothing_is_written(run, questions, tmp_path):
    words = ["red", "--data", questions, "--classify", "--baseline", questions]
    code, out, _ = run(*words, "--json", tmp_path / "c.json", "--no_record")

    found = json.loads((tmp_path / "c.json").read_text())["models"][0]["metrics"]
    assert code == 0
    assert list(found) == ["accuracy", "macro_precision", "macro_recall", "macro_f1", "perplexity"]
    assert "accuracy" in out
    assert "class of the most similar row (3-grams of characters): accuracy 1.000" in " ".join(out.split())


def test_perplexity_is_the_exponential_of_nats_per_token(whole, family, questions):
    import torch

    from align.data import load_records
    from align.data.rendering.render_view import render_view
    from align.models.adapters import load_models
    from align.models.loading import Precision

    loaded = load_models(family, ["base"], Precision(bf16=False))
    rows = render_view("demonstration", load_records(str(questions)).records, loaded.tokenizer, 512).rows
    nats, tokens = 0.0, 0
    for row in rows:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["completion_mask"][1:], dtype=torch.bool)
        with torch.no_grad():
            logprobs = loaded.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nats -= float(logprobs[mask].gather(-1, ids[0, 1:][mask][:, None]).sum())
        tokens += int(mask.sum())

    found = json.loads(whole["json"].read_text())["models"][2]["metrics"]["perplexity"]

    assert found["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "--data: missing"),
        (["--data", "Q", "--harness", "x"], 2, "given beside --harness"),
        (["--data", "nosuch"], 3, "no dataset of this name"),
        (["--data", "Q", "--limit", "1"], 2, "two records or more"),
        (["--data", "Q", "--scorer", "bleuu"], 2, "did you mean bleu?"),
        (["--data", "Q", "--by", "knd"], 2, "did you mean kind?"),
        (["--data", "Q", "--labels", "yes,maybe"], 3, "the data has the class 'no'"),
        (["--data", "Q", "--rewards", "[{name: lenght}]"], 2, "did you mean length?"),
        (["--data", "Q", "--rewards", "length"], 2, "not a list"),
        (["--data", "Q", "--judge", "reward_model"], 2, "give two models or more"),
        (["red@v1", "--data", "Q"], 2, "the same model as red"),
        (["judge", "--data", "Q"], 2, "a reward model scores text"),
        (["nosuch", "--data", "Q"], 4, "no such name in the registry"),
        (["base", "--data", "Q", "--judge", "reward_model"], 2, "give --reward_model REF"),
        (["--data", "Q", "--reward_model", "blue"], 4, "expected a reward model"),
        (["--data", "Q", "--report", "/nowhere/r.html"], 2, "no folder /nowhere"),
        (["--data", "Q", "--temperature", "-1"], 2, "temperature"),
        (["--data", "Q", "--judge_timeout", "0"], 2, "--judge_timeout 0: give seconds"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(run, questions, monkeypatch, words, code, told):
    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("align.models.adapters.load_models", never)

    found = run("red", *(str(questions) if word == "Q" else word for word in words))

    assert found[0] == code, found
    assert told in found[2]
    said = [line for line in found[2].splitlines() if not line.startswith("evaluate: ")]
    assert len(said) == 1


def test_a_metric_that_no_record_has_a_reference_for_is_refused(run, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')

    code, _, told = run("red", "--data", tmp_path / "bare.jsonl", "--scorer", "bleu")

    assert (code, "--scorer bleu: needs a reference" in told) == (3, True)


def test_a_file_that_takes_nothing_is_named_and_costs_no_record(family, questions):
    asked = EvaluationRequest(
        data=str(questions), sampling=Sampling(0.0, max_new_tokens=2), scorers=("token_f1",), kl=False
    )
    found = evaluate(family, ["blue"], asked)
    before = len(evaluations.read_records(family.resolve("blue")))

    with pytest.raises(MachineError, match=r"/dev/full: cannot be written .No space left on device.; free space"):
        save_evaluation(family, found, Outputs(report="/dev/full"))

    assert len(evaluations.read_records(family.resolve("blue"))) == before + 1


def test_a_registry_that_takes_no_numbers_is_refused_before_the_work(tiny_base, questions, tmp_path, capsys):
    (tmp_path / "tmp").write_text("no folder, so nothing can be staged in it")

    code = main([str(tiny_base), "--data", str(questions), "--registry", str(tmp_path), *FAST])

    said = capsys.readouterr()
    assert (code, said.out) == (6, "")
    assert "the registry cannot be written to" in said.err
    assert "--no_record" in said.err


def test_a_missing_package_is_named_with_its_command(run, questions, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sacrebleu" else known(name, *rest)
    )

    code, _, told = run("red", "--data", questions, "--scorer", "bleu", "--limit", "2")

    assert code == 6
    assert 'pip install "align[eval]"' in told


def test_help_is_quick_and_imports_nothing_heavy():
    script = (
        "import sys; from align.evaluate import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: sys.exit(','.join({'torch', 'numpy'} & set(sys.modules)) or end.code)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)

    assert (done.returncode, done.stderr) == (0, "")
    assert "--report FILE.html" in done.stdout


def test_a_judge_that_is_down_is_told_and_everything_else_is_kept(run, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("align.evaluation.remote_judge.RemoteJudge._pause", lambda *_: 0.0)
    monkeypatch.setenv("COLUMNS", "160")
    words = ["red", "blue", "--data", questions, "--limit", "4", "--no_record", "--json", tmp_path / "j.json"]

    code, out, told = run(*words, "--judge", "http://127.0.0.1:9/v1", "--judge_model", "absent")

    assert code == 6
    assert "judge absent: gave no verdict" in told
    assert "judge unreachable" in out
    (judged,) = json.loads((tmp_path / "j.json").read_text())["models"][1]["judged"]
    assert judged["win_rate"] is None
    assert sum(judged["failed"].values()) == 4 - judged["ties"]


def test_two_judges_of_one_name_are_both_heard():
    words = ["a", "b", "--data", "x", "--reward_model", "judge", "--judge_model", "judge"]
    urls = ["http://one/v1", "http://two/v1"]

    judges = read_judges(parse_options(build_parser(), [*words, *(word for url in urls for word in ("--judge", url))]))

    assert list(judges) == [f"judge at {url}" for url in urls]


def test_programs_evaluate_without_a_command_line(family, questions, tmp_path):
    asked = EvaluationRequest(
        data=str(questions), sampling=Sampling(0.0, max_new_tokens=4), scorers=("token_f1",), kl=False
    )
    before = len(evaluations.read_records(family.resolve("red")))

    found = evaluate(family, ["red"], asked)

    assert save_evaluation(family, found, Outputs(report=str(tmp_path / "r.html"))) == ["red@v1"]
    assert len(evaluations.read_records(family.resolve("red"))) == before + 1
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_models_over_different_bases_are_compared_on_the_same_records(run, questions, tiny_base, tmp_path):
    words = ["--data", questions, "--limit", "4", "--scorer", "token_f1", "--json", tmp_path / "b.json"]

    code, out, _ = run(tiny_base, "red", *words)

    first, second = json.loads((tmp_path / "b.json").read_text())["models"]
    assert code == 0
    assert (first["reference"], second["against"]) == (str(tiny_base), str(tiny_base))
    assert second["comparison"]["tokens"]["wins"] + second["comparison"]["tokens"]["ties"] <= 4
    assert "recorded beside red@v1;" in out
