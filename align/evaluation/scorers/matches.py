"""Completions against reference answers: exactly, normalised, by shared words, as numbers, and as papers compare them.

SQuAD (Rajpurkar et al. 2016, section 6.1): lower case, without punctuation, articles and extra white space; F1 of the
bags of words. CMRC 2018 (Cui et al. 2019, section 4.1): Chinese text is cut into characters, everything else into
words, and precision and recall count the longest run of these that both answers share.
GSM8K (Cobbe et al. 2021, section 4.2): a problem is solved when its last number is the reference's. BIG-Bench Hard
(Suzgun et al. 2022, section 3) asks for "So the answer is X." and compares X. Here X stands first behind the last
"answer is", or else last in the last line, and is the kind of thing the target is: an option such as (B), yes or no,
True or False, a number, a text.
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
# As the paper's own script finds it, a currency sign allowed: the first mark with a number right behind it.
_OFFICIAL = re.compile(r"####\s*(?P<number>[-−]?[$€£¥]?[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.ASCII)
# Else the first number on the line of the first mark that has one.
_MARKED = re.compile(r"####[^\d\n]*?(?P<number>[-−]? ?[$€£¥]? ?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.ASCII)
_MAX_CHARACTERS = 10_000
"""of a completion's end in which its answer is looked for"""
_CONCLUSION = re.compile(r"(?i)\banswer\s*(?:is|:)[\s:]*")
_OPTION = re.compile(r"\(([A-Z])\)")
_BARE_OPTION = re.compile(r"(?<![\w'])(?:[B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")  # A and I may be words
_NUMBER = re.compile(r"[-−]?\d+(?:\.\d+)?", re.ASCII)
_JUDGEMENTS = ({"true", "false"}, {"yes", "no"}, {"valid", "invalid"})


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


@scorer(needs=("answer",))
def gsm8k(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the number after the first `####`, or else the last, equals the reference."""
    marked, end = "####" in completion, completion[-_MAX_CHARACTERS:]
    if marked:
        begins = completion.index("####")
        text = completion[begins : begins + _MAX_CHARACTERS]
        match = _OFFICIAL.search(text) or _MARKED.search(text)
        end = match["number"].replace(" ", "") if match else ""
    given, expected = last_number(end), last_number(record.answer or "")
    return {"correct": float(given is not None and given == expected), "marked": float(marked)}


@scorer(needs=("answer",))
def bbh(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the extracted answer is the target."""
    target = _plain(record.answer or "")
    end = completion[-_MAX_CHARACTERS:].replace("*", "").strip()
    *_, marked = [None, *_CONCLUSION.finditer(end)]
    lines = (end[marked.end() :] if marked else end).splitlines()
    given = _candidates(lines[0 if marked else -1], target, first=marked is not None) if lines else []
    return {"correct": float(bool(target and given) and _plain(given[0 if marked else -1]) == target)}


def _candidates(line: str, target: str, first: bool) -> list[str]:
    """Return everything in a line that is of the target's kind; options without brackets only if there are no others.

    With `first`, an option without brackets at the beginning of the line counts too.
    """
    if re.fullmatch(r"\([a-z]\)", target):
        opening = _BARE_OPTION.match(line) if first else None
        letters = [opening[0]] if opening else _OPTION.findall(line) or _BARE_OPTION.findall(line)
        return [f"({letter})" for letter in letters]
    for judgements in _JUDGEMENTS:
        if target in judgements:
            return [word for word in re.findall(r"[a-z]+", line.lower()) if word in judgements]
    return _NUMBER.findall(line) if _NUMBER.fullmatch(target) else [line]


def _plain(text: str) -> str:
    return " ".join(text.casefold().strip(" \t\"'`.").replace("−", "-").split())
