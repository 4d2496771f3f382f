"""HumanEval: a function is right when the problem's own tests pass (Chen et al. 2021, section 2); the mean is pass@1.

A completion goes on from the prompt up to the first line that begins something else (section 2.1 lists them), or it is
an answer of a chat model: then its fenced code that defines the function, or else the whole text, takes its place.
"""

from __future__ import annotations

import re

from align.errors import DataError
from align.evaluation.sandbox import run_program
from align.evaluation.scorers import scorer
from align.schema import Record, content_text

_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_STOPS = re.compile(r"\n(?=class|def|#|@|if|print|```)")


@scorer(needs=("meta.test", "meta.entry_point"), executes_code=True)
def humaneval(record: Record, completion: str) -> dict[str, float]:
    """Return 1 when the tests pass within three seconds of CPU time, in the sandbox."""
    name, test = record.meta["entry_point"], record.meta["test"]
    if not isinstance(name, str) or not name.isidentifier() or not isinstance(test, str):
        raise DataError(
            f"scorer humaneval: entry_point and test of {record.where} are no name and no text; correct the row"
        )
    code = complete_program(content_text(record.prompt), completion, name)
    return {"pass@1": float(run_program(f"{code}\n{test}\ncheck({name})\n").passed)}


def complete_program(prompt: str, completion: str, name: str) -> str:
    """Return the prompt's code with its function completed, or replaced by a whole one in the completion."""
    completion = completion.replace("\r\n", "\n")
    defines = re.compile(rf"^(?:async )?def {name}\b", re.MULTILINE)
    blocks = _FENCED.findall(completion)
    whole = next((code for code in [*blocks, completion] if defines.search(code)), None)
    if whole is not None:
        return f"{prompt}\n    pass\n\n{whole}"
    body = _STOPS.split((blocks[0] if blocks else completion).strip("\n"), maxsplit=1)[0]
    if body and not body[0].isspace():  # a tokenizer or a fence may have taken the first line's indentation
        body = f"    {body}"
    return f"{prompt.rstrip(' ')}{body}\n"
