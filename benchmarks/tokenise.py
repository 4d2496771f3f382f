"""Tokenise generated chats: one process, several, and from the cache, beside TRL's own preparation of the same rows.

    python benchmarks/tokenise.py [--rows 20000] [--processes 2] [--rounds 3]

Every round runs every variant once, in turn; medians are printed. All variants give input ids and a mask of the
assistant's tokens; the first round checks that they are the same.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.data.record_sets import RecordSet, digest_records
from align.data.tokenise import TokenPlan, tokenise
from align.models.scratch import train_tokenizer
from align.schema import Messages, Record, assistant, user

WORDS = (
    "the", "shop", "opens", "at", "nine", "and", "closes", "late", "on", "every", "day", "of", "the", "week", "but",
    "sunday", "when", "nobody", "works", "there",
)  # fmt: skip


def chat(rng: random.Random) -> Messages:
    """Two to four turns of 20 to 60 words."""

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(20, 60)))

    return [turn for _ in range(rng.randint(1, 2)) for turn in (user(words()), assistant(words()))]


def ours(found: RecordSet, tokenizer: Any, folder: Path, processes: int) -> Any:
    """The rows by align."""
    return tokenise(found, tokenizer, TokenPlan("demonstration", 4096), cache=folder, processes=processes).rows


def theirs(found: RecordSet, tokenizer: Any, processes: int) -> Any:
    """The rows as TRL prepares conversations for a loss on the assistant's turns."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    data = Dataset.from_list([{"messages": [*record.prompt, *(record.completion or [])]} for record in found.records])

    def render(row: dict[str, Any]) -> dict[str, Any]:
        out = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": out["input_ids"], "completion_mask": out["assistant_masks"]}

    return data.map(render, remove_columns=["messages"], num_proc=processes if processes > 1 else None)


def variants(found: RecordSet, tokenizer: Any, folder: Path, processes: int) -> dict[str, Callable[[], Any]]:
    """What is compared, by name, each to be run once."""
    single, several = folder / "single", folder / "several"
    return {
        "align, 1 process": lambda: ours(found, tokenizer, single, 1),
        f"align, {processes} processes": lambda: ours(found, tokenizer, several, processes),
        "align, from the cache": lambda: ours(found, tokenizer, single, 1),
        "TRL's preparation, 1 process": lambda: theirs(found, tokenizer, 1),
        f"TRL's preparation, {processes} processes": lambda: theirs(found, tokenizer, processes),
    }


def main() -> int:
    """Print the median seconds of each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = random.Random(0)
    talks = [chat(rng) for _ in range(options.rows)]
    records = [Record(prompt=talk[:1], completion=talk[1:]) for talk in talks]
    found = RecordSet(records, "made", digest_records(records), len(records))
    tokenizer = train_tokenizer([" ".join(WORDS)] * 50, 768)
    seconds: dict[str, list[float]] = {}
    first = None
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, run in variants(found, tokenizer, Path(folder), options.processes).items():
                start = time.perf_counter()
                rows = run()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                sample = rows[:50]["input_ids"], rows[:50]["completion_mask"]
                first = first or sample
                if sample != first:
                    sys.exit(f"{name}: other rows than the first variant's")
    sys.stdout.writelines(f"{statistics.median(each):8.2f} s  {name}\n" for name, each in seconds.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
