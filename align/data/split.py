"""Splitting a dataset in two by the content of its prompts.

Which side a row falls on depends on its prompt, the share and the seed alone. So rows that share a prompt stay
together, and adding rows to a file moves none of the old ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Literal

from align.data.convert import to_trl
from align.data.writing import check_target, dump_row, replacing
from align.errors import DataError, UsageError
from align.schema import Record

By = Literal["prompt", "first_turn"]


def is_held_out(record: Record, share: float, seed: int = 0, by: By = "prompt") -> bool:
    """Return whether a record falls on the smaller side, by the hash of its prompt (or first user turn, or text)."""
    if record.text is not None:
        key = record.text
    elif by == "prompt":
        key = json.dumps([[turn["role"], turn["content"]] for turn in record.prompt])
    else:
        key = next((turn["content"] for turn in record.prompt if turn["role"] == "user"), "")
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_records(
    batches: Iterable[list[Record]],
    folder: Path,
    share: float,
    *,
    seed: int = 0,
    by: By = "prompt",
    force: bool = False,
) -> tuple[int, int]:
    """Write `train.jsonl` and `eval.jsonl` into a folder, both or neither, and return the numbers of their rows.

    Raises UsageError for a share that is not between 0 and 1 or files that are there already, and DataError when one
    side would be empty.
    """
    if not 0 < share < 1:
        raise UsageError(f"--eval {share}: expected a share between 0 and 1, such as 0.05")
    targets = [folder / "train.jsonl", folder / "eval.jsonl"]
    for target in targets:
        check_target(target, force=force)
    counts = [0, 0]
    with ExitStack() as stack:
        parts = [stack.enter_context(replacing(target)) for target in targets]
        files = [stack.enter_context(part.open("wb")) for part in parts]  # closed before either takes its name
        for record in chain.from_iterable(batches):
            side = is_held_out(record, share, seed, by)
            files[side].write(dump_row(to_trl(record)))
            counts[side] += 1
        if not all(counts):
            empty = "eval" if counts[0] else "train"
            raise DataError(
                f"{folder}: of {sum(counts)} rows none falls on the {empty} side at --eval {share:g}; "
                "give more rows, another share or another --seed"
            )
    return counts[0], counts[1]
