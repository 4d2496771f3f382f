"""GSM8K: a school maths problem is solved when its last number is the reference's (Cobbe et al. 2021, section 4.2)."""

from __future__ import annotations

import re

from align.evaluation.scorers import scorer
from align.rewards.answer_rewards import last_number
from align.schema import Record

# As the paper's own script finds it, a currency sign allowed: the first mark with a number right behind it.
_OFFICIAL = re.compile(r"####\s*(?P<number>[-−]?[$€£¥]?[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.ASCII)
# Else the first number on the line of the first mark that has one.
_MARKED = re.compile(r"####[^\d\n]*?(?P<number>[-−]? ?[$€£¥]? ?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.ASCII)
_MAX_CHARACTERS = 10_000
"""of a completion's end are searched"""


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
