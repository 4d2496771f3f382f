"""What batching and sorting by length gain an evaluation: tokens a second of its path over one prompt at a time.

    python benchmarks/evaluate.py [--prompts 500] [--max_new_tokens 32] [--threads 2] [--json FILE]

A random base of 110 million parameters with an adapter answers prompts of unequal length greedily, all of them through
`align.evaluation.completions.generate_completions`, then a sample of them one at a time through the same. The texts
must agree. About three minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ONE_AT_A_TIME = 40
"""of so many prompts, one is also answered alone"""


def records_of(count: int) -> list[Any]:
    """Prompts of 4 to 200 words."""
    from engine import WORDS

    from align.schema import Record, user

    rng = random.Random(0)
    sizes = [max(4, min(200, int(rng.lognormvariate(3.5, 0.7)))) for _ in range(count)]
    return [Record(prompt=[user(" ".join(rng.choices(WORDS, k=size)))]) for size in sizes]


def measure(folder: Path, prompts: int, longest: int) -> dict[str, Any]:
    """Tokens a second of all prompts together, and of a sample one at a time."""
    from engine import open_engine, write_models

    from align.engine.protocol import Sampling
    from align.evaluation.completions import generate_completions

    write_models(folder)
    engine = open_engine(folder, ["first"])
    (model,) = engine.models
    records, sampling = records_of(prompts), Sampling(temperature=0.0, max_new_tokens=longest)

    def timed(some: list[Any]) -> tuple[float, list[Any]]:
        started = time.perf_counter()
        written, _ = generate_completions(engine, [model], some, sampling)
        return time.perf_counter() - started, written[model]

    timed(records[:2])
    seconds, together = timed(records)
    places = range(0, prompts, ONE_AT_A_TIME)
    alone = [timed([records[place]]) for place in places]
    engine.close()
    rate = sum(each.tokens for each in together) / seconds
    alone_rate = sum(each.tokens for _, (each,) in alone) / sum(spent for spent, _ in alone)
    differing = sum(each.text != together[place].text for place, (_, (each,)) in zip(places, alone, strict=True))
    return {
        "prompts": prompts,
        "tokens_per_second": rate,
        "tokens_per_second_alone": alone_rate,
        "ratio": rate / alone_rate,
        "sampled": len(alone),
        "differing": differing,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.prompts, options.max_new_tokens)
    rates = f"{found['tokens_per_second']:.0f} / {found['tokens_per_second_alone']:.1f} tokens/s"
    sys.stdout.write(f"{options.prompts} prompts together / one at a time: {rates}, ratio {found['ratio']:.2f}; ")
    sys.stdout.write(f"{found['differing']} of {found['sampled']} texts differ\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
