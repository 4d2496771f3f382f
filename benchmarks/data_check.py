"""How fast and in how much memory chats are checked and converted, beside `datasets` only reading the same file.

    python benchmarks/data_check.py [--rows 100000] [--file FILE]

Writes a JSON-lines file of chats of two to four messages, then runs each reader in a process of its own and prints its
rows a second, its seconds (the best of three readings) and the most memory its process held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAYING = "the shop opens at nine and closes at five please send your order number we are sorry für Rückfragen 开门 谢谢"
WORDS = SAYING.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--file", type=Path, help="read this file in place of a generated one")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        return run_reader(options.reader, options.file)
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or write_chats(Path(folder) / "chats.jsonl", options.rows)
        print(f"{file.stat().st_size / 1e6:.1f} MB")
        for reader in READERS:
            command = [sys.executable, __file__, "--reader", reader, "--file", str(file)]
            subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def write_chats(path: Path, rows: int, seed: int = 0) -> Path:
    """Chats of two to four messages, about 700 bytes each."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            system = [{"role": "system", "content": "You are the shop's assistant."}] if rng.random() < 0.3 else []
            turns = [*system]
            for _ in range(rng.choice((1, 1, 2)) if not system else 1):
                turns.append({"role": "user", "content": sentence(rng, 10, 40)})
                turns.append({"role": "assistant", "content": sentence(rng, 30, 90)})
            file.write(json.dumps({"id": f"chat-{number}", "messages": turns}, ensure_ascii=False) + "\n")
    return path


def sentence(rng: random.Random, shortest: int, longest: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))


def run_reader(name: str, file: Path) -> None:
    prepare, read = READERS[name]
    prepare()
    before = peak_memory()
    rows, seconds = 0, float("inf")
    for _ in range(3):
        start = time.perf_counter()
        rows = read(str(file))
        seconds = min(seconds, time.perf_counter() - start)
    grown = f"{before:.0f} MB before, {peak_memory():.0f} MB at most"
    print(f"{name:<22} {rows / seconds:>9,.0f} rows/s  {seconds:6.2f} s  {grown}")


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def import_ours() -> None:
    import align.data  # noqa: F401


def import_theirs() -> None:
    import datasets

    datasets.disable_progress_bars()


def scan_records(file: str) -> int:
    from align.data.load import open_scan

    return sum(len(batch) for batch in open_scan(file, view="demonstration"))


def load_all(file: str) -> int:
    from align.data import load_records

    return load_records(file, view="demonstration").rows


def read_theirs(file: str) -> int:
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        return len(datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache))


READERS: dict[str, tuple[Callable[[], None], Callable[[str], int]]] = {
    "align scan": (import_ours, scan_records),
    "align load_records": (import_ours, load_all),
    "datasets load_dataset": (import_theirs, read_theirs),
}


if __name__ == "__main__":
    main()
