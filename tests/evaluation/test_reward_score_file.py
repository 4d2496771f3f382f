"""`align reward score`: rows in, rows with scores out, and a summary that is right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_tiny_qwen3

from align import reward
from align.config import LoraSettings
from align.models.adapter_config import adapter_parameters
from align.models.adapters import digests_of_base, save_adapter
from align.models.head_scores import score_sequences
from align.models.heads import load_scorer, start_reward
from align.models.loading import Precision
from align.registry import Registry, open_registry
from align.schema import assistant, user


def register_judge(registry: Registry, base: Path) -> None:
    """A reward model `judge` with random weights, as a stage would have registered it."""
    loaded = start_reward(registry, registry.resolve(str(base)), LoraSettings(r=2), Precision(bf16=False))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(loaded.model, "default"):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with registry.stage("judge") as staging:
        save_adapter(loaded.model, "default", staging.path, loaded.base.location)
        loaded.tokenizer.save_pretrained(staging.path)
        origin = {"reference": str(base), "location": str(base), "digests": digests_of_base(loaded.base)}
        facts = {"parents": [], "template_digest": None, "data": [], "metrics": {}, "versions": {}}
        staging.commit({"stage": "reward", "kind": "reward", "base": origin, "config": {"max_length": 60}} | facts)


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_base) -> Registry:
    registry = open_registry(tmp_path_factory.mktemp("judged") / "registry")
    register_judge(registry, tiny_base)
    return registry


def run(registry: Registry, *words: object) -> int:
    return reward.main(["score", *map(str, words), "--registry", str(registry.root)])


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def score_of(judged):
    """The score of one conversation alone, by its rendered text."""
    loaded = load_scorer(judged, judged.resolve("judge"), Precision(bf16=False))

    def score(*turns) -> float:
        text = loaded.tokenizer.apply_chat_template(list(turns), tokenize=False).rstrip("\n")
        return float(score_sequences(loaded, [loaded.tokenizer.encode(text)], 1)[0])

    return score


TEXTS = ["dog", "the quick brown fox", "eggs", "a lazy dog over there and away", "blue", "far far away", "to"]


def test_every_answer_gets_its_own_score_in_the_order_of_the_file(judged, tmp_path, score_of, capsys):
    data = write(tmp_path / "talks.jsonl", [{"prompt": f"fox {n}", "completion": text} for n, text in enumerate(TEXTS)])

    assert run(judged, "judge", data, "--out", tmp_path / "scores.jsonl", "--batch_size", 2) == 0

    rows = read(tmp_path / "scores.jsonl")
    assert [row["completion"] for row in rows] == [[assistant(text)] for text in TEXTS]
    expected = [score_of(user(f"fox {n}"), assistant(text)) for n, text in enumerate(TEXTS)]
    np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert "judge@v1 on talks.jsonl: 7 answers scored, 60 tokens at most" in printed
    assert f"mean {np.mean(expected):.3f}, spread {np.std(expected):.3f}" in printed
    assert "accuracy" not in printed
    assert "AUC" not in printed


def test_a_pair_gets_two_scores_and_a_margin_and_keeps_what_it_had(judged, tmp_path, score_of, capsys):
    rows = [
        {"prompt": [user("fox")], "chosen": [assistant(a)], "rejected": [assistant(b)], "margin": 7.0, "id": a}
        for a, b in zip(TEXTS, reversed(TEXTS), strict=True)
        if a != b
    ]
    data = write(tmp_path / "pairs.jsonl", rows)

    assert run(judged, "judge", data, "--out", tmp_path / "scores.jsonl") == 0

    found = read(tmp_path / "scores.jsonl")
    for row in found:
        assert row["score_chosen"] == pytest.approx(score_of(*row["prompt"], *row["chosen"]), rel=1e-4, abs=1e-5)
        assert row["score_rejected"] == pytest.approx(score_of(*row["prompt"], *row["rejected"]), rel=1e-4, abs=1e-5)
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]
        assert row["meta"]["margin"] == 7.0
    # Every pair stands in the file in both orders, so half of them are right.
    assert "accuracy    0.500 [0.188, 0.812] of 6 pairs; mean margin 0.000" in capsys.readouterr().out.replace(
        "-0.000", "0.000"
    )


def test_labelled_answers_give_an_auc(judged, tmp_path, capsys):
    rows = [{"prompt": "fox", "completion": text, "label": place % 2 == 0} for place, text in enumerate(TEXTS)]
    data = write(tmp_path / "labels.jsonl", rows)

    assert run(judged, "judge", data, "--out", tmp_path / "scores.jsonl") == 0

    scores = {row["completion"][0]["content"]: row["score"] for row in read(tmp_path / "scores.jsonl")}
    good, bad = [scores[text] for text in TEXTS[::2]], [scores[text] for text in TEXTS[1::2]]
    expected = np.mean([a > b for a in good for b in bad])
    assert f"AUC         {expected:.3f} over 4 good and 3 bad answers" in capsys.readouterr().out


def test_rows_that_do_not_fit_and_bad_rows_are_counted(judged, tmp_path, capsys):
    rows = [{"prompt": "fox", "completion": text} for text in ("dog", "eggs " * 40, "", "blue")]
    data = write(tmp_path / "mixed.jsonl", rows)

    assert run(judged, "judge", data) == 3
    assert "mixed.jsonl:3" in capsys.readouterr().err

    assert run(judged, "judge", data, "--on_bad_row", "skip", "--out", tmp_path / "scores.jsonl") == 0
    printed = capsys.readouterr().out
    assert "2 answers scored" in printed
    assert re.search(r" 1  longer than max_length\n", printed)
    assert re.search(r" 1  empty completion\n", printed)
    assert len(read(tmp_path / "scores.jsonl")) == 2

    assert run(judged, "judge", data, "--on_bad_row", "skip", "--max_length", 500) == 0
    assert "3 answers scored, 500 tokens at most" in capsys.readouterr().out

    assert run(judged, "judge", data, "--on_bad_row", "skip", "--max_length", 5) == 3
    assert "0 answers left to score" in (told := capsys.readouterr().err)
    assert "longer than max_length: 3" in told


def test_what_cannot_be_scored_is_refused_before_weights_are_loaded(judged, tmp_path, tiny_base, capsys, monkeypatch):
    monkeypatch.setattr("align.models.heads.load_base", None)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "fox"}])
    talks = write(tmp_path / "talks.jsonl", [{"prompt": "fox", "completion": "dog"}])
    cases = [
        (["judge", prompts], 3, "prompts.jsonl:1: a prompt row holds no answer"),
        ([tiny_base, talks], 4, "expected a reward model with one score head, found kind base and 0 heads"),
        (["jugde", talks], 4, "did you mean judge"),
        (["judge", tmp_path / "absent.jsonl"], 3, "absent.jsonl"),
        (["judge", talks, "--out", talks], 2, "there already; give another name, or --force"),
        (["judge", talks, "--out", tmp_path / "x.xlsx"], 2, "with the ending"),
        (["judge", talks, "--max_length", 5000], 2, "holds 2048 positions"),
        (["judge", talks, "--batch_size", 0], 2, "expected 1 or more"),
    ]
    for words, code, message in cases:
        assert run(judged, *words) == code
        told = capsys.readouterr().err
        assert told.startswith("error: "), told
        assert message in told


def test_a_reward_model_whose_base_was_replaced_is_refused_with_both_digests(tmp_path, capsys):
    base = build_tiny_qwen3(tmp_path / "base")
    registry = open_registry(tmp_path / "registry")
    register_judge(registry, base)
    build_tiny_qwen3(base, seed=7)
    data = write(tmp_path / "talks.jsonl", [{"prompt": "fox", "completion": "dog"}])

    assert run(registry, "judge", data) == 4

    told = capsys.readouterr().err
    assert re.search(r"judge@v1: .*sha256:[0-9a-f]{64}.*sha256:[0-9a-f]{64}", told, re.DOTALL), told


def test_a_foreign_tokenizer_beside_a_reward_model_is_refused(judged, tmp_path, capsys):
    folder = tmp_path / "loose"
    shutil.copytree(judged.resolve("judge").location, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (folder / "manifest.json").unlink()
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    first, second = list(vocabulary)[60:62]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    data = write(tmp_path / "talks.jsonl", [{"prompt": "fox", "completion": "dog"}])

    assert run(judged, folder, data) == 4

    assert re.search(r"its tokenizer has the vocabulary sha256:.*that of its base", capsys.readouterr().err)


def test_help_tells_of_both(capsys):
    assert reward.main(["--help"]) == 0
    assert "align reward score REF FILE" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="0"):
        reward.main(["score", "--help"])
    assert "--out FILE" in capsys.readouterr().out
