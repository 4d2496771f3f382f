"""Classifiers without a model, which a trained one should beat: the commonest class, the class of the nearest row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from align.data import load_records
from align.errors import DataError, UsageError
from align.evaluation.metric import classification_metrics, estimate_metric
from align.schema import Record
from align.statistics import Resamples

_GRAM = 3
"""characters; enough for languages without spaces, too"""
_BLOCK = 512


def baseline_notes(
    records: Sequence[Record], labels: Sequence[str], train: str, roots: Mapping[str, Path] | None = None, seed: int = 0
) -> list[str]:
    """Return a line on each classifier that learned from the dataset `train`, with 95 % intervals.

    Raises UsageError without labels, and DataError when a row has no answer, which is its class.
    """
    if not labels:
        raise UsageError(f"--baseline {train}: nothing is classified; give --classify or --labels, too")
    known = load_records(train, roots=roots)
    if unanswered := next((record for record in known.records if record.answer is None), None):
        raise DataError(f"--baseline {train}: {unanswered.where} has no answer, which is its class; give labelled rows")
    classes = [record.answer or "" for record in known.records]
    commonest = Counter(classes).most_common(1)[0][0]
    nearest = nearest_rows([_text(record) for record in known.records], [_text(record) for record in records])
    choices = {
        f"always {commonest!r}": [commonest] * len(records),
        f"class of the most similar row ({_GRAM}-grams of characters)": [classes[index] for index in nearest],
    }
    answers = [record.answer or "" for record in records]
    everything = list(dict.fromkeys([*labels, *classes]))
    resamples = Resamples(len(records), seed)
    lines = []
    for title, chosen in choices.items():
        metrics = {metric.name: metric for metric in classification_metrics(answers, chosen, everything)}
        shown = [
            f"{name} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
            for name in ("accuracy", "macro_f1")
            for found in [estimate_metric(metrics[name], resamples)]
        ]
        lines.append(f"without a model, from {known.rows} rows of {train}: {title}: {', '.join(shown)}")
    return lines


def nearest_rows(known: Sequence[str], asked: Sequence[str]) -> list[int]:
    """Return for each text the index of the most similar known one: cosine of tf-idf over character n-grams."""
    grams: dict[str, int] = {}
    for text in known:
        for gram in _grams(text):
            grams.setdefault(gram, len(grams))
    counts = _count_matrix(known, grams)
    idf = np.log((1 + len(known)) / (1 + np.asarray((counts > 0).sum(axis=0)).ravel())) + 1
    ours, theirs = (_unit_rows(matrix.multiply(idf).tocsr()) for matrix in (counts, _count_matrix(asked, grams)))
    found: list[int] = []
    for start in range(0, len(asked), _BLOCK):
        found += (theirs[start : start + _BLOCK] @ ours.T).toarray().argmax(axis=1).tolist()
    return found


def _grams(text: str) -> Counter[str]:
    padded = f"  {' '.join(text.casefold().split())}  "
    return Counter(padded[start : start + _GRAM] for start in range(len(padded) - _GRAM + 1))


def _count_matrix(texts: Sequence[str], grams: dict[str, int]) -> csr_matrix:
    entries = [
        (row, grams[gram], count)
        for row, text in enumerate(texts)
        for gram, count in _grams(text).items()
        if gram in grams
    ]
    rows, columns, counts = np.array(entries, dtype=float).reshape(-1, 3).T
    return csr_matrix((counts, (rows.astype(int), columns.astype(int))), shape=(len(texts), len(grams)))


def _unit_rows(matrix: csr_matrix) -> csr_matrix:
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return csr_matrix(matrix.multiply(1 / np.maximum(lengths, 1e-12)[:, None]))


def _text(record: Record) -> str:
    return next((message["content"] for message in reversed(record.prompt) if message["role"] == "user"), "")
