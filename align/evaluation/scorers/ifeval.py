"""IFEval: whether a response follows the instructions a program can verify (Zhou et al. 2023, sections 2 and 3).

Prompt-level accuracy asks for all of them, instruction-level accuracy counts each. The loose kind takes a response for
following an instruction if it does so, too, without its first line, without its last line, without its asterisks
or without several of these, for models like to begin with "Sure, here it is:".
"""

from __future__ import annotations

import itertools
from typing import Any

from align.errors import DataError
from align.evaluation.instructions import follows
from align.evaluation.scorers import scorer
from align.schema import Record

_LONGEST = 200_000
"""characters of a response that are read"""


@scorer(
    needs=("meta.instruction_id_list", "meta.kwargs"),
    weights={"instruction_strict": "instructions", "instruction_loose": "instructions"},
)
def ifeval(record: Record, completion: str) -> dict[str, float]:
    """Prompt-level and instruction-level accuracy, strict and loose; of the latter each record has its own share."""
    asked = _asked(record)
    variants = loosened(completion[:_LONGEST])
    strict = [follows(variants[0], instruction, arguments) for instruction, arguments in asked]
    loose = [
        good or any(follows(text, instruction, arguments) for text in variants[1:])
        for good, (instruction, arguments) in zip(strict, asked, strict=True)
    ]
    return {
        "prompt_strict": float(all(strict)),
        "instruction_strict": sum(strict) / len(asked),
        "prompt_loose": float(all(loose)),
        "instruction_loose": sum(loose) / len(asked),
        "instructions": float(len(asked)),
    }


def _asked(record: Record) -> list[tuple[str, dict[str, Any]]]:
    names, arguments = record.meta["instruction_id_list"], record.meta["kwargs"]
    sound = isinstance(names, list) and isinstance(arguments, list) and len(names) == len(arguments) > 0
    if not sound or not all(isinstance(given, dict) for given in arguments):
        raise DataError(
            f"scorer ifeval: instruction_id_list and kwargs of {record.where} are not lists of one length; mend the row"
        )
    return list(zip(names, arguments, strict=True))


def loosened(response: str) -> list[str]:
    """The response and its seven variants: without first line, last line or both, and each without its asterisks."""
    lines = response.split("\n")
    cut = [lines[first:last] for first, last in itertools.product((0, 1), (len(lines), len(lines) - 1))]
    texts = [response, *("\n".join(kept).strip() for kept in cut[1:])]
    return [*texts, *(text.replace("*", "") for text in texts)]
