"""BIG-Bench Hard: a completion's final answer against the target (Suzgun et al. 2022, section 3).

The paper asks for "So the answer is X." and compares X. Here X stands first behind the last "answer is", or else last
in the last line, and is the kind of thing the target is: an option such as (B), yes or no, True or False, a number, a
text.
"""

from __future__ import annotations

import re

from align.evaluation.scorers import scorer
from align.schema import Record

_MAX_CHARACTERS = 10_000
"""characters of a completion's end in which its answer is looked for"""
_CONCLUSION = re.compile(r"(?i)\banswer\s*(?:is|:)[\s:]*")
_OPTION = re.compile(r"\(([A-Z])\)")
_BARE_OPTION = re.compile(r"(?<![\w'])(?:[B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")  # A and I may be words
_NUMBER = re.compile(r"[-−]?\d+(?:\.\d+)?", re.ASCII)
_JUDGEMENTS = ({"true", "false"}, {"yes", "no"}, {"valid", "invalid"})


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
