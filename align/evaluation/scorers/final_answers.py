"""Final answers at the end of a completion: GSM8K's number and BIG-Bench Hard's answer of the target's kind.

GSM8K (Cobbe et al. 2021, section 4.2): a problem is solved when its last number is the reference's. BIG-Bench Hard
(Suzgun et al. 2022, section 3) asks for "So the answer is X." and compares X. Here X stands first behind the last
"answer is", or else last in the last line, and is the kind of thing the target is: an option such as (B), yes or no,
True or False, a number, a text.
"""

from __future__ import annotations

import re

from align.evaluation.scorers import scorer
from align.rewards.built_in import last_number
from align.schema import Record

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
    return {"correct": float(bool(target) and extract_answer(completion, target) == target)}


def extract_answer(completion: str, target: str) -> str | None:
    """Return a completion's answer in the spelling of this kind of target; None without one."""
    end = completion[-_MAX_CHARACTERS:].replace("*", "").strip()
    *_, marked = [None, *_CONCLUSION.finditer(end)]
    lines = (end[marked.end() :] if marked else end).splitlines()
    if not lines:
        return None
    line = lines[0] if marked else lines[-1]
    given = _candidates(line, target, first=marked is not None)
    return _plain(given[0] if marked else given[-1]) if given else None


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
