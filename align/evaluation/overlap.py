"""Completions against reference texts: BLEU and chrF by sacrebleu's definitions, ROUGE by rouge-score.

BLEU and chrF are formulas over corpus sums. The sums are stored by record, so that they can be resampled and sliced;
tests compare the results with sacrebleu's.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence

import numpy as np

from align.errors import MachineError
from align.evaluation.metric import Metric, mean_metric
from align.schema import Record

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_ORDERS = 4
_CHARACTERS = 6
_BETA_SQUARED = 4

Texts = Sequence[str | None]


def require(module: str) -> None:
    """Raise MachineError unless a package of the extra `eval` is installed."""
    if importlib.util.find_spec(module) is None:
        raise MachineError(f'this metric needs {module}, which is not installed; pip install "align[eval]"')


def reference_text(record: Record) -> str | None:
    """Return the reference of a completion: first turn of the demonstration or chosen answer, else the answer."""
    turns = record.completion or record.chosen
    return turns[0]["content"] if turns else record.answer


def bleu(records: Sequence[Record], texts: Texts) -> list[Metric]:
    """Return corpus BLEU (Papineni et al. 2002) in [0, 100], tokenized as `zh` where the reference has Chinese."""
    require("sacrebleu")
    from sacrebleu.metrics import BLEU

    metrics = {chinese: BLEU(tokenize="zh" if chinese else "13a") for chinese in (False, True)}

    def count(text: str, reference: str) -> list[float]:
        score = metrics[bool(_HAN.search(reference))].corpus_score([text], [[reference]])
        return [score.sys_len, score.ref_len, *score.counts, *score.totals]

    return [_corpus("bleu", records, texts, count, bleu_of_sums, 2 + 2 * _ORDERS)]


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return BLEU of sums (..., 10): system length, reference length, matching n-grams, all n-grams.

    `exp` smoothing (Chen and Cherry 2014, method 3): the k-th order without a match counts as 1 / 2^k matches.
    """
    system, reference, right, total = sums[..., 0], sums[..., 1], sums[..., 2 : 2 + _ORDERS], sums[..., 2 + _ORDERS :]
    unmatched = (right == 0) & (total > 0)
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), right)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(total > 0, np.log(smoothed / total), -np.inf)
        brevity = np.where(system < reference, 1 - reference / system, 0.0)
        score = 100 * np.exp(np.where(np.isnan(brevity), -np.inf, brevity) + logs.mean(axis=-1))
    return np.where(right.any(axis=-1), score, np.where(reference > 0, 0.0, np.nan))


def chrf(records: Sequence[Record], texts: Texts) -> list[Metric]:
    """Return corpus chrF2 (Popović 2015) in [0, 100], of character 6-grams without white space."""
    require("sacrebleu")
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    def count(text: str, reference: str) -> list[float]:
        ngrams = [extract_all_char_ngrams(side, _CHARACTERS) for side in (text, reference)]
        score: list[float] = []
        for ours, theirs in zip(*ngrams, strict=True):
            # As sacrebleu counts: where the reference has no such n-gram, ours are no misses.
            score += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
        return score

    return [_corpus("chrf", records, texts, count, chrf_of_sums, 3 * _CHARACTERS)]


def chrf_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return chrF2 of sums (..., 18): for each order our n-grams, the reference's, and those in both."""
    counts = sums.reshape(*sums.shape[:-1], _CHARACTERS, 3)
    ours, theirs, both = counts[..., 0], counts[..., 1], counts[..., 2]
    used = (ours > 0) & (theirs > 0)
    orders = np.maximum(used.sum(axis=-1), 1)
    precision = np.where(used, both / np.maximum(ours, 1), 0.0).sum(axis=-1) / orders
    recall = np.where(used, both / np.maximum(theirs, 1), 0.0).sum(axis=-1) / orders
    below = _BETA_SQUARED * precision + recall
    score = 100 * (1 + _BETA_SQUARED) * precision * recall / np.where(below > 0, below, 1.0)
    return np.where(theirs[..., 0] > 0, score, np.nan)


def rouge(records: Sequence[Record], texts: Texts) -> list[Metric]:
    """Return ROUGE-1, -2 and -L F1 (Lin 2004) in [0, 1], stemmed for English, by character for Chinese."""
    require("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    plain, by_character = RougeScorer(kinds, use_stemmer=True), RougeScorer(kinds, tokenizer=_Characters())
    rows = np.full((len(records), len(kinds)), np.nan)
    for index, (record, text) in enumerate(zip(records, texts, strict=True)):
        reference = reference_text(record)
        if text is not None and reference is not None:
            mostly_chinese = 2 * len(_HAN.findall(reference)) > len("".join(reference.split()))
            score = (by_character if mostly_chinese else plain).score(reference, text)
            rows[index] = [score[kind].fmeasure for kind in kinds]
    return [mean_metric(kind, rows[:, column]) for column, kind in enumerate(kinds)]


class _Characters:
    """A rouge-score tokenizer that keeps Chinese: its own drops everything but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall("[\u3400-\u4dbf\u4e00-\u9fff]|[^\\W_\u3400-\u4dbf\u4e00-\u9fff]+", text.lower())


def _corpus(
    name: str,
    records: Sequence[Record],
    texts: Texts,
    count: Callable[[str, str], list[float]],
    of: Callable[[np.ndarray], np.ndarray],
    width: int,
) -> Metric:
    parts = np.zeros((len(records), width))
    has_text = np.zeros(len(records), dtype=bool)
    for index, (record, text) in enumerate(zip(records, texts, strict=True)):
        reference = reference_text(record)
        if text is not None and reference is not None:
            parts[index], has_text[index] = count(text, reference), True
    return Metric(name, parts, np.where(has_text, of(parts), np.nan), of)


CORPUS: dict[str, Callable[[Sequence[Record], Texts], list[Metric]]] = {"bleu": bleu, "chrf": chrf, "rouge": rouge}
"""corpus metrics, named beside the scorers"""
