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
_LONGEST = 10_000
"""characters of a completion's end in which its answer is looked for"""


@scorer(needs=("answer",))
def gsm8k(record: Record, completion: str) -> dict[str, float]:
    """1 when the number after the first `####`, or else the last, equals the reference; `1,234`, `-3` are numbers."""
    marked, end = "####" in completion, completion[-_LONGEST:]
    if marked:
        begins = completion.index("####")
        text = completion[begins : begins + _LONGEST]
        found = _OFFICIAL.search(text) or _MARKED.search(text)
        end = found["number"].replace(" ", "") if found else ""
    said, wanted = last_number(end), last_number(record.answer or "")
    return {"correct": float(said is not None and said == wanted), "marked": float(marked)}
