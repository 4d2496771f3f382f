"""Completions against reference answers: exactly, normalised, by shared words, as numbers, by published scripts.

SQuAD (Rajpurkar et al. 2016, section 6.1): lower case, without punctuation, articles and extra white space; F1 of the
bags of words. CMRC 2018 (Cui et al. 2019, section 4.1): Chinese text is cut into characters, everything else into
words, and precision and recall count the longest run of these that both answers share.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from difflib import SequenceMatcher

from align.evaluation.scorers import scorer
from align.rewards.built_in import last_number
from align.schema import Record

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "，。！？；：、（）《》“”‘’【】…—·")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HAN = re.compile(r"([\u3400-\u4dbf\u4e00-\u9fff])")
# The signs CMRC's script leaves out; others, such as a full stop of ASCII, are a part of what they stand in.
_CMRC_SIGNS = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』")
_CHARACTER_OR_WORD = re.compile("[\u4e00-\u9fa5]|[^\\W\u4e00-\u9fa5]+|[^\\w\\s]")
_MAX_TOKENS = 2_000
"""tokens of an answer that are compared; the search for shared runs takes time with their number"""


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
    shared = (Counter(given) & Counter(expected)).total()
    return _f1(shared, given, expected) if given or expected else 1.0


def _f1(shared: int, ours: list[str], theirs: list[str]) -> float:
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


@scorer(needs=("answer",))
def exact_match(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the completion is a reference answer, apart from white space."""
    return {"exact_match": float(completion.split() in [reference.split() for reference in references_of(record)])}


@scorer(needs=("answer",))
def normalised_match(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the completion, normalised as SQuAD does, is a reference answer."""
    return {"normalised_match": float(normalise(completion) in map(normalise, references_of(record)))}


@scorer(needs=("answer",))
def token_f1(record: Record, completion: str) -> dict[str, float]:
    """Return SQuAD's token F1: the best over the reference answers."""
    return {"token_f1": max(shared_words_f1(completion, reference) for reference in references_of(record))}


@scorer(needs=("answer",))
def numeric_match(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the last number of the completion is the last number of a reference answer."""
    given = last_number(completion)
    return {"numeric_match": float(given is not None and given in map(last_number, references_of(record)))}


@scorer(needs=("answer",))
def squad(record: Record, completion: str) -> dict[str, float]:
    """Return `exact` and `f1` of SQuAD's script."""
    ours, *references = (
        _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()
        for text in (completion, *references_of(record))
    )
    return {
        "exact": float(ours in references),
        "f1": max(_f1((Counter(ours) & Counter(words)).total(), ours, words) for words in references),
    }


@scorer(needs=("answer",))
def cmrc(record: Record, completion: str) -> dict[str, float]:
    """Return `exact` and `f1` of CMRC's script; a run of anything but Chinese is split at white space and signs."""
    plain = [text.lower().strip().translate(_CMRC_SIGNS) for text in (completion, *references_of(record))]
    ours, *references = (_CHARACTER_OR_WORD.findall(text)[:_MAX_TOKENS] for text in plain)
    return {
        "exact": float(plain[0] in plain[1:]),
        "f1": max(_f1(longest_common_run(ours, tokens), ours, tokens) for tokens in references),
    }


def longest_common_run(ours: list[str], theirs: list[str]) -> int:
    """Return the length of the longest run of tokens that both lists hold."""
    return SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match().size
