"""GSM8K: a school maths problem is solved when its last number is the reference's (Cobbe et al. 2021, section 4.2)."""

from __future__ import annotations

import re

from align.evaluation.scorers import scorer
from align.rl.rewards.answers import last_number
from align.schema import Record

# The first number behind the mark; what follows it ("18 dollars, for 9 * 2 = 18") is talk.
_MARKED = re.compile(r"[^\d\n]*?(?P<number>[-−]? ?[$€£¥]? ?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.ASCII)
_LONGEST = 10_000
"""characters of a completion's end in which its answer is looked for"""


@scorer(needs=("answer",))
def gsm8k(record: Record, completion: str) -> dict[str, float]:
    """1 when the number after `####`, or else the last one, equals the reference; `1,234` and `-3` are numbers."""
    end = completion[-_LONGEST:]
    marked = "####" in end
    if marked:
        found = _MARKED.match(end.rsplit("####", 1)[1].lstrip())
        end = found["number"].replace(" ", "") if found else ""
    said, wanted = last_number(end), last_number(record.answer or "")
    return {"correct": float(said is not None and said == wanted), "marked": float(marked)}
