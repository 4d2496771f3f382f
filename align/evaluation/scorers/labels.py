"""Choices by likelihood: the class of a text (GLUE's shape), the letter of an answer (C-Eval's and MMLU's).

The model's choice is the label with the highest log-probability as the answer, as Hendrycks et al. 2021 and Huang et
al. 2023 (section 3.3, answer only) choose among A to D. Nothing is sampled, so no answer can fail to be understood.
"""

from __future__ import annotations

from collections.abc import Sequence

from align.errors import DataError
from align.evaluation.scorers import Likelihood, scorer
from align.evaluation.scorers.truthfulqa import true_probability_share
from align.schema import Record


def _labels(record: Record) -> list[str]:
    labels = record.meta["labels"]
    if not isinstance(labels, list) or len(labels) < 2 or _right_label(record) not in labels:
        raise DataError(
            f"scorer label_choice: the answer {record.answer!r} of {record.where} is none of its labels {labels!r}; "
            "read the data with format: labels or format: choice"
        )
    return labels


def _right_label(record: Record) -> str:
    """Return the answer as its label: the reader of choices writes the letter in brackets."""
    answer = record.answer or ""
    return answer[1:-1] if answer.startswith("(") and answer.endswith(")") else answer


@scorer(needs=("answer", "meta.labels"), options=_labels)
def label_choice(record: Record, likelihoods: Sequence[Likelihood]) -> dict[str, float]:
    """Return whether the right label is the most likely, and its share of the labels' probability."""
    right = _right_label(record)
    scored = [(one.logprob, label == right) for label, one in zip(_labels(record), likelihoods, strict=True)]
    best = next(value for value, good in scored if good)
    return {
        "accuracy": float(all(best > value for value, good in scored if not good)),
        "probability": true_probability_share(scored),
    }
