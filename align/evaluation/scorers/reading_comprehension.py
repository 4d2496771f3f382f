"""Answers taken from a text: SQuAD and XQuAD by words, CMRC 2018 by Chinese characters; the best over the references.

SQuAD (Rajpurkar et al. 2016, section 6.1): lower case, without punctuation, articles and extra white space; F1 of the
bags of words. CMRC 2018 (Cui et al. 2019, section 4.1): Chinese text is cut into characters, everything else into
words, and precision and recall count the longest run of these that both answers share.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from align.evaluation.scorers import scorer
from align.evaluation.scorers.matches import references_of
from align.schema import Record

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The signs CMRC's script leaves out; others, such as a full stop of ASCII, are a part of what they stand in.
_CMRC_SIGNS = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』")
_CHARACTER_OR_WORD = re.compile("[\u4e00-\u9fa5]|[^\\W\u4e00-\u9fa5]+|[^\\w\\s]")
_MAX_TOKENS = 2_000
"""tokens of an answer that are compared; the table of shared runs grows with their number"""


@scorer(needs=("answer",))
def squad(record: Record, completion: str) -> dict[str, float]:
    """Return `exact` and `f1` of SQuAD's script."""
    ours = _squad_words(completion)
    references = [_squad_words(reference) for reference in references_of(record)]
    return {
        "exact": float(ours in references),
        "f1": max(_f1(sum((Counter(ours) & Counter(words)).values()), ours, words) for words in references),
    }


@scorer(needs=("answer",))
def cmrc(record: Record, completion: str) -> dict[str, float]:
    """Return `exact` and `f1` of CMRC's script; a run of anything but Chinese is split at white space and signs."""
    ours = _cmrc_tokens(completion)
    references = [_cmrc_tokens(reference) for reference in references_of(record)]
    return {
        "exact": float(_cmrc_plain(completion) in map(_cmrc_plain, references_of(record))),
        "f1": max(_f1(longest_common_run(ours, tokens), ours, tokens) for tokens in references),
    }


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def _cmrc_plain(text: str) -> str:
    return text.lower().strip().translate(_CMRC_SIGNS)


def _cmrc_tokens(text: str) -> list[str]:
    return _CHARACTER_OR_WORD.findall(_cmrc_plain(text))[:_MAX_TOKENS]


def _f1(shared: int, ours: list[str], theirs: list[str]) -> float:
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def longest_common_run(ours: list[str], theirs: list[str]) -> int:
    """Return the length of the longest run of tokens that both lists hold."""
    longest = 0
    before = [0] * (len(theirs) + 1)
    for token in ours:
        row = [0]
        for index, other in enumerate(theirs):
            row.append(before[index] + 1 if token == other else 0)
        longest, before = max(longest, *row), row
    return longest
