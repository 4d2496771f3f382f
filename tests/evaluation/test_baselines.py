from __future__ import annotations

import json
import math
import random
from collections import Counter

import pytest

from align.errors import DataError, UsageError
from align.evaluation.baselines import baseline_notes, nearest_rows
from align.schema import Record, assistant, user


def _record(text: str, label: str) -> Record:
    return Record(prompt=[user(text)], completion=[assistant(label)], answer=label)


def _write(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return f"{path}:format=labels"


def test_the_nearest_row_is_that_of_an_independent_tf_idf():
    rng = random.Random(3)
    words = "card cash refund lost where my is the money 退款 卡 在哪 transfer pending fee".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 7))) for _ in range(60)]
    known, asked = texts[:40], texts[40:]

    def grams(text):
        padded = f"  {text}  "
        return Counter(padded[i : i + 3] for i in range(len(padded) - 2))

    frequency = Counter(gram for text in known for gram in grams(text))
    idf = {gram: math.log(41 / (1 + sum(gram in grams(text) for text in known))) + 1 for gram in frequency}

    def cosine(a, b):
        first, second = ({g: n * idf[g] for g, n in grams(text).items() if g in idf} for text in (a, b))
        product = sum(value * second.get(gram, 0) for gram, value in first.items())
        return product / math.hypot(*first.values()) / math.hypot(*second.values())

    found = nearest_rows(known, asked)

    for text, index in zip(asked, found, strict=True):
        assert cosine(known[index], text) == pytest.approx(max(cosine(one, text) for one in known))


def test_a_text_without_a_known_gram_gets_some_row():
    assert nearest_rows(["card", "cash"], ["qqq", ""]) == [0, 0]


def test_both_baselines_are_told_with_their_intervals(tmp_path):
    train = _write(
        tmp_path / "train.jsonl", [("my card is lost", "lost"), ("give back", "refund"), ("refund me", "refund")]
    )
    records = [_record("the card is lost", "lost"), _record("refund me please", "refund"), _record("lost card", "lost")]

    always, nearest = baseline_notes(records, ["lost", "refund"], train)

    assert "from 3 rows of" in always
    assert "always 'refund': accuracy 0.333 [" in always
    assert "class of the most similar row (3-grams of characters): accuracy 1.000 [" in nearest


def test_a_baseline_needs_classes(tmp_path):
    train = _write(tmp_path / "train.jsonl", [("a", "x"), ("b", "y")])
    with pytest.raises(UsageError, match="nothing is classified; give --classify or --labels"):
        baseline_notes([_record("a", "x")], [], train)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="has no answer, which is its class"):
        baseline_notes([_record("a", "x")], ["x", "y"], str(tmp_path / "prompts.jsonl"))


def test_banking77_is_mostly_told_by_its_nearest_row(real_data):
    data = real_data / "customer_service" / "banking77_test.csv"
    from align.data import load_records

    test = load_records(f"{data}:format=labels,part=test").records
    labels = sorted({record.answer for record in test})

    always, nearest = baseline_notes(test, labels, f"{data}:format=labels,part=train")

    assert float(always.partition("accuracy ")[2][:5]) < 0.03
    assert 0.7 < float(nearest.partition("accuracy ")[2][:5]) < 0.8
