"""IFEval: whether a response follows the instructions a program can verify (Zhou et al. 2023, sections 2 and 3).

Prompt-level accuracy asks for all of them, instruction-level accuracy counts each. The loose kind takes a response for
following an instruction if it does so, too, without its first line, without its last line, without its asterisks
or without several of these, since models often begin with "Sure, here it is:".
"""

from __future__ import annotations

import itertools
from typing import Any

from align.errors import DataError
from align.evaluation.instructions import follows
from align.evaluation.scorers import scorer
from align.schema import Record

_MAX_CHARACTERS = 200_000
"""of a response are read"""


@scorer(
    needs=("meta.instruction_id_list", "meta.kwargs"),
    weights={"instruction_strict": "instructions", "instruction_loose": "instructions"},
)
def ifeval(record: Record, completion: str) -> dict[str, float]:
    """Return prompt-level and instruction-level accuracy, strict and loose."""
    instructions = _instructions(record)
    variants = loose_variants(completion[:_MAX_CHARACTERS])
    strict = [follows(variants[0], instruction, arguments) for instruction, arguments in instructions]
    loose = [
        good or any(follows(text, instruction, arguments) for text in variants[1:])
        for good, (instruction, arguments) in zip(strict, instructions, strict=True)
    ]
    return {
        "prompt_strict": float(all(strict)),
        "instruction_strict": sum(strict) / len(instructions),
        "prompt_loose": float(all(loose)),
        "instruction_loose": sum(loose) / len(instructions),
        "instructions": float(len(instructions)),
    }


def _instructions(record: Record) -> list[tuple[str, dict[str, Any]]]:
    names, arguments = record.meta["instruction_id_list"], record.meta["kwargs"]
    sound = isinstance(names, list) and isinstance(arguments, list) and len(names) == len(arguments) > 0
    if not sound or not all(isinstance(given, dict) for given in arguments):
        raise DataError(
            f"scorer ifeval: instruction_id_list and kwargs of {record.where} are not lists of one length; "
            "correct the row"
        )
    return list(zip(names, arguments, strict=True))


def loose_variants(response: str) -> list[str]:
    """Return the response and variants without first line, last line or both, and all without asterisks."""
    lines = response.split("\n")
    cut = [lines[first:last] for first, last in itertools.product((0, 1), (len(lines), len(lines) - 1))]
    texts = [response, *("\n".join(part).strip() for part in cut[1:])]
    return [*texts, *(text.replace("*", "") for text in texts)]
