"""BIG-Bench Hard: the answer a completion comes to, against the target (Suzgun et al. 2022, section 3).

The paper asks for "So the answer is X." and compares X. Here X stands first behind the last "answer is", or else last
in the last line, and is the kind of thing the target is: an option such as (B), yes or no, True or False, a number, a
text.
"""

from __future__ import annotations

import re

from align.evaluation.scorers import scorer
from align.schema import Record

_LONGEST = 10_000
"""characters of a completion's end in which its answer is looked for"""
_CONCLUSION = re.compile(r"(?i)\banswer\s*(?:is|:)[\s:]*")
_OPTION = re.compile(r"\(([A-Z])\)")
_BARE_OPTION = re.compile(r"(?<![\w'])(?:[B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")  # A and I may be words
_NUMBER = re.compile(r"[-−]?\d+(?:\.\d+)?", re.ASCII)
_JUDGEMENTS = ({"true", "false"}, {"yes", "no"}, {"valid", "invalid"})


@scorer(needs=("answer",))
def bbh(record: Record, completion: str) -> dict[str, float]:
    """1 when the answer that was found is the target."""
    target = _plain(record.answer or "")
    return {"correct": float(bool(target) and conclusion(completion, target) == target)}


def conclusion(completion: str, target: str) -> str | None:
    """What a completion comes to, spelled as a target of this kind is; None when there is no such thing in it."""
    end = completion[-_LONGEST:].replace("*", "").strip()
    *_, marked = [None, *_CONCLUSION.finditer(end)]
    lines = (end[marked.end() :] if marked else end).splitlines()
    if not lines:
        return None
    line = lines[0] if marked else lines[-1]
    said = _found(line, target, first=marked is not None)
    return _plain(said[0] if marked else said[-1]) if said else None


def _found(line: str, target: str, first: bool) -> list[str]:
    """Everything in a line that is the kind of thing the target is; options without brackets only for want of others.

    The line may be wanted for what comes first in it, and then an option without brackets counts there, too.
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
