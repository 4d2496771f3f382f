"""Metrics equal the reference packages' own numbers on the same strings."""

from __future__ import annotations

import random
import re
import string
from collections import Counter

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from align.errors import MachineError
from align.evaluation import overlap
from align.evaluation.completions import is_refusal, repetition_rate
from align.evaluation.metric import classification_metrics, estimate_metric
from align.evaluation.overlap import bleu, chrf, rouge
from align.evaluation.scorers import scorer_named
from align.schema import Record, assistant
from align.statistics import Resamples

WORDS = "the quick brown fox, jumps over a lazy dog and (runs) far away. It's 3.5 km!".split()
CHARACTERS = "今天天气很好，我们去公园散步吧你好吗谢谢。abc 12"


def _corpus(kind: str, size: int, seed: int) -> tuple[list[Record], list[str]]:
    """References, and hypotheses of which some are right, some share words, some are empty."""
    rng = random.Random(seed)

    def text(low: int) -> str:
        pool, joint = (WORDS, " ") if kind == "en" else (CHARACTERS, "")
        return joint.join(rng.choice(pool) for _ in range(rng.randint(low, 18)))

    references = [text(3) for _ in range(size)]
    said = [rng.choice((reference, text(0), text(0), reference[: len(reference) // 2])) for reference in references]
    return [Record(completion=[assistant(reference)]) for reference in references], said


def _references(records: list[Record]) -> list[str]:
    return [record.completion[0]["content"] for record in records]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 6, 50])
@pytest.mark.parametrize("kind", ["en", "zh"])
def test_bleu_and_chrf_are_sacrebleus(kind, size, seed):
    records, said = _corpus(kind, size, seed)

    ours = bleu(records, said)[0].value, chrf(records, said)[0].value

    expected = BLEU(tokenize="zh" if kind == "zh" else "13a").corpus_score(said, [_references(records)]).score
    assert ours[0] == pytest.approx(expected, abs=1e-9)
    assert ours[1] == pytest.approx(CHRF().corpus_score(said, [_references(records)]).score, abs=1e-9)


def test_the_bootstrap_of_bleu_resamples_what_sacrebleu_would_be_given():
    records, said = _corpus("en", 20, 9)
    measure = bleu(records, said)[0]
    weights = Resamples(20, 0, 3).sums(np.eye(20))  # how often each record is in each resample

    sums = Resamples(20, 0, 3).sums(measure.parts)

    for counts, value in zip(weights.astype(int), measure.of(sums), strict=True):
        places = np.repeat(np.arange(20), counts)
        drawn = BLEU().corpus_score([said[i] for i in places], [[_references(records)[i] for i in places]])
        assert value == pytest.approx(drawn.score, abs=1e-9)


def test_rouge_is_rouge_scores_own():
    records, said = _corpus("en", 30, 2)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    found = {measure.name: measure.value for measure in rouge(records, said)}

    scores = [scorer.score(reference, text) for reference, text in zip(_references(records), said, strict=True)]
    for name, value in found.items():
        assert value == pytest.approx(np.mean([score[name].fmeasure for score in scores]))


def test_rouge_of_chinese_counts_characters():
    record = Record(completion=[assistant("今天天气好")])

    assert rouge([record], ["今天天气好"])[0].value == 1
    assert rouge([record], ["明天天气坏"])[0].value == pytest.approx(3 / 5)


def test_a_record_without_reference_or_completion_counts_nowhere():
    records, said = _corpus("en", 4, 1)
    more = [*records, Record(), Record(completion=[assistant("lost")])]

    for function in (bleu, chrf, rouge):
        before, after = function(records, said)[0], function(more, [*said, "text", None])[0]
        assert after.value == pytest.approx(before.value)
        assert (after.count, len(after.rows)) == (4, 6)


def test_without_the_extra_the_message_names_the_command(monkeypatch):
    monkeypatch.setattr(overlap.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(MachineError, match=r'sacrebleu, which is not installed; pip install "align\[eval\]"'):
        bleu([], [])


def _squad_f1(prediction: str, truth: str) -> float:
    """The definition of the SQuAD script, derived again from the paper (Rajpurkar et al. 2016, section 6.1)."""

    def words(text: str) -> list[str]:
        bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    said, wanted = words(prediction), words(truth)
    same = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(40))
def test_token_f1_is_squads(seed):
    rng = random.Random(seed)
    said, first, second = (" ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 7))) for _ in range(3))
    record = Record(answer=first, meta={"answers": [first, second]})

    found = scorer_named("token_f1")(record, said)["token_f1"]

    assert found == pytest.approx(max(_squad_f1(said, first), _squad_f1(said, second)))


@pytest.mark.parametrize(
    ("name", "answer", "said", "expected"),
    [
        ("exact_match", "Paris", " Paris\n", 1),
        ("exact_match", "Paris", "paris", 0),
        ("normalised_match", "the Paris!", "paris", 1),
        ("normalised_match", "巴黎", "巴黎。", 1),
        ("normalised_match", "Paris", "in Paris", 0),
        ("numeric_match", "1,234", "It is 1234.", 1),
        ("numeric_match", "-5", "minus: -5", 1),
        ("numeric_match", "5", "-5", 0),
        ("numeric_match", "5", "five", 0),
        ("token_f1", "今天下雨", "今天天晴", 0.5),
    ],
)
def test_matches_read_answers_as_people_do(name, answer, said, expected):
    assert scorer_named(name)(Record(answer=answer), said)[name] == expected


@pytest.mark.parametrize("seed", range(6))
def test_classification_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels = ["a", "b", "c", "never"]
    answers = rng.choice(labels[:3], 40, p=[0.7, 0.2, 0.1]).tolist()
    chosen = rng.choice(labels[: 2 + seed % 2], 40).tolist()

    found = {measure.name: measure.value for measure in classification_metrics(answers, chosen, labels)}

    macro = precision_recall_fscore_support(answers, chosen, average="macro", zero_division=0)
    assert found["accuracy"] == pytest.approx(accuracy_score(answers, chosen))
    assert [found[f"macro_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(macro[:3])


def test_macro_f1_has_an_interval():
    measures = classification_metrics(["a", "b"] * 30, ["a", "b", "b"] * 20, ["a", "b"])

    found = estimate_metric(measures[-1], Resamples(60))

    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("a b c", 0), ("a b c d e", 0), ("a b c d a b c d", 1 / 5), ("ha " * 8, 4 / 5), ("哈" * 8, 4 / 5)],
)
def test_repetition_is_the_share_of_repeated_four_grams(text, share):
    assert repetition_rate(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI, I have no opinion.", True),
        ("抱歉，我无法回答这个问题。", True),
        ("很抱歉，我不能提供。", True),
        ("The kettle costs 42 euros.", False),
        ("水壶的价格是42欧元。", False),
        ("Here is a poem. " * 8 + "I cannot go on.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_the_first_words(text, refuses):
    assert is_refusal(text) is refuses
