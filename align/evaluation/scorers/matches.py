"""Completions against reference answers: exactly, normalised, by shared words (SQuAD), and as numbers."""

from __future__ import annotations

import re
import string
from collections import Counter

from align.evaluation.scorers import scorer
from align.rewards.answer_rewards import last_number
from align.schema import Record

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "，。！？；：、（）《》“”‘’【】…—·")
_HAN = re.compile(r"([\u3400-\u4dbf\u4e00-\u9fff])")


def references_of(record: Record) -> list[str]:
    """Return every reference answer of a record: all of SQuAD's where the reader kept them, else the answer."""
    several = record.meta.get("answers")
    if isinstance(several, list) and several and all(isinstance(one, str) for one in several):
        return several
    return [] if record.answer is None else [record.answer]


def normalise(text: str) -> str:
    """Return lower case without punctuation, articles and extra white space (the script of Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def shared_words_f1(completion: str, reference: str) -> float:
    """Return the F1 of the words two normalised texts share; a Chinese character is a word (as CMRC 2018 counts)."""
    given, expected = (_HAN.sub(r" \1 ", normalise(text)).split() for text in (completion, reference))
    shared = sum((Counter(given) & Counter(expected)).values())
    if not given or not expected:
        return float(given == expected)
    return 2 * shared / (len(given) + len(expected))


@scorer(needs=("answer",))
def exact_match(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the completion is a reference answer, apart from white space."""
    given = completion.split()
    return {"exact_match": float(any(given == reference.split() for reference in references_of(record)))}


@scorer(needs=("answer",))
def normalised_match(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the completion, normalised as SQuAD does, is a reference answer."""
    given = normalise(completion)
    return {"normalised_match": float(any(given == normalise(reference) for reference in references_of(record)))}


@scorer(needs=("answer",))
def token_f1(record: Record, completion: str) -> dict[str, float]:
    """Return SQuAD's token F1: the best over the reference answers."""
    return {"token_f1": max(shared_words_f1(completion, reference) for reference in references_of(record))}


@scorer(needs=("answer",))
def numeric_match(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the last number of the completion is the last number of a reference answer."""
    given = last_number(completion)
    expected = [last_number(reference) for reference in references_of(record)]
    return {"numeric_match": float(given is not None and given in expected)}
