"""What rows of several models together cost and gain, on a random base of 110 million parameters with LoRA adapters.

    python benchmarks/engine.py [--part memory panes throughput gap] [--prompts 500] [--threads 2] [--json FILE]

memory      What base and two adapters that write add to a process, over what base and one adapter add that write as
            many rows: largest resident size less what the libraries take.
panes       Two models answering side by side over one after the other: the same texts, wall-clock time.
throughput  Prompts and answers of unequal length as an evaluation has them: tokens a second of all of them in
            `LocalEngine.complete`, over one at a time (a sample of them, the same texts).
gap         Eight rows stream when a prompt of 2,000 words comes: the longest time between two of their tokens until
            that prompt is read, at once over in parts as the server does, in turn; and how long the prompt takes.

Each part runs in processes of its own. On cores that others use too, more threads than are free take many times longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

SIZE = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip
WORDS = "the quick brown fox jumps over a lazy dog and runs far away from here to there with nine blue eggs".split()  # noqa: SIM905
ONE_AT_A_TIME = 20
"""of so many prompts, one is also answered alone"""


def write_models(folder: Path) -> None:
    """A random base and two adapters over it, each in a folder of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from align.models.loading import save_base
    from align.models.scratch import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)])
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZE, max_position_embeddings=8192, tie_word_embeddings=True, **special))
    # Fresh weights give nearly flat logits: texts would not tell whether two runs agree.
    base.model.norm.weight.data.mul_(4)
    save_base(base, tokenizer, folder / "base")
    save_adapters(base, folder / "base", folder, ["first", "second"])


def save_adapters(base: Any, location: Path, folder: Path, names: list[str]) -> None:
    """Write adapters with random weights over a base, each in a folder of its own."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    for name in names:
        model.peft_config[name].base_model_name_or_path = str(location)
    model.save_pretrained(folder)


def open_engine(folder: Path, names: list[str], *, chunked: bool = False) -> Any:
    """An engine over some of the models; a chunked one prefills long prompts in chunks."""
    from align.engine.local import LocalEngine, default_prefill_chunk
    from align.models.adapters import load_models
    from align.models.loading import Precision
    from align.registry import open_registry

    references = [str(folder / name) for name in names]
    loaded = load_models(open_registry(folder / "registry"), references, Precision(bf16=False))
    return LocalEngine(loaded, prefill_chunk_tokens=default_prefill_chunk(loaded.model) if chunked else None)


def rows_of(models: list[str], count: int) -> list[Any]:
    """Rows with prompts and answers of unequal length, models in turn."""
    from align.engine.protocol import Row, Sampling
    from align.schema import user

    rng, rows = random.Random(0), []
    for place in range(count):
        prompt = " ".join(rng.choices(WORDS, k=max(4, min(100, int(rng.lognormvariate(2.7, 0.7))))))
        sampling = Sampling(temperature=1.0, max_new_tokens=max(4, min(96, int(rng.lognormvariate(3.2, 0.7)))))
        rows.append(Row(models[place % len(models)], [user(prompt)], place, sampling))
    return rows


def write(engine: Any, rows: list[Any]) -> tuple[list[str], int]:
    """The texts of some rows and how many tokens they have."""
    from align.engine.protocol import Sampling

    texts = engine.complete(rows, Sampling())
    # No row of a random model ends by itself but by the rarest chance; what it may write is what it writes.
    return texts, sum(row.sampling.max_new_tokens for row in rows)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall-clock time, and the result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def memory(folder: Path, names: list[str]) -> dict[str, Any]:
    """Bytes by which this process has grown at most once it has written two rows."""
    import peft
    import transformers

    # Named, so that they are loaded: both import their parts when they are asked for.
    _ = peft.PeftModel, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast
    before = resident_bytes()
    engine = open_engine(folder, names)
    write(engine, rows_of([name for name in engine.models if "base" not in name][-2:], 2))
    engine.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"models": names, "peak": peak, "grown": peak - before}


def resident_bytes() -> int:
    """What this process holds in memory now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def panes(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of two rows together and one after the other, in turn; of two adapters, and of base and adapter."""
    from align.engine.protocol import Row, Sampling
    from align.schema import user

    engine = open_engine(folder, ["first", "second", "base"])
    first, second, base = engine.models
    found: dict[str, Any] = {}
    for label, pair in {"two adapters": (first, second), "base and adapter": (base, first)}.items():
        rows = [Row(model, [user(" ".join(WORDS))], 1, Sampling(temperature=1.0, max_new_tokens=32)) for model in pair]
        write(engine, rows)
        times = []
        for _ in range(rounds):
            together, (texts, _) = timed(lambda rows=rows: write(engine, rows))
            apart, alone = timed(lambda rows=rows: [write(engine, [row])[0][0] for row in rows])
            if texts != alone:
                raise RuntimeError(f"{label}: the texts differ")
            times.append((together, apart))
        ratios = [apart / together for together, apart in times]
        found[label] = {
            "seconds": times,
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    engine.close()
    return found


def throughput(folder: Path, prompts: int) -> dict[str, Any]:
    """Tokens a second of many rows at once and of some of them one at a time."""
    engine = open_engine(folder, ["first", "second", "base"])
    rows = rows_of(engine.models, prompts)
    write(engine, rows[:2])
    seconds, (texts, tokens) = timed(lambda: write(engine, rows))
    sample = range(0, prompts, ONE_AT_A_TIME)
    alone_seconds, alone = timed(lambda: [write(engine, [rows[place]]) for place in sample])
    engine.close()
    differing = sum(text != [texts[place]] for place, (text, _) in zip(sample, alone, strict=True))
    rate, alone_rate = tokens / seconds, sum(size for _, size in alone) / alone_seconds
    return {
        "prompts": prompts,
        "tokens": tokens,
        "tokens_per_second": rate,
        "tokens_per_second_alone": alone_rate,
        "ratio": rate / alone_rate,
        "sampled": len(sample),
        "differing": differing,
    }


def gap(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds between tokens while a long prompt is read at once and in parts, in turn, and until its first token."""
    found: dict[str, Any] = {"at once": [], "in parts": []}
    texts = set()
    for _ in range(rounds):
        for label in ("at once", "in parts"):
            engine = open_engine(folder, ["first", "second"], chunked=label == "in parts")
            *figures, text = interrupted(engine)
            engine.close()
            found[label].append(figures)
            texts.add(text)
    if len(texts) > 1:
        raise RuntimeError("gap: the texts differ")
    pairs = list(zip(found["at once"], found["in parts"], strict=True))
    return found | {
        "ratio": statistics.median(whole[0] / parts[0] for whole, parts in pairs),
        "ratio_first_token": statistics.median(parts[2] / whole[2] for whole, parts in pairs),
    }


def interrupted(engine: Any) -> tuple[float, float, float, str]:
    """What a long prompt does to eight rows that stream.

    Seconds between two of their tokens at most and usually, seconds until its own first token, and its answer.
    """
    from align.engine.protocol import GenerationRequest, Row, RowDone, Sampling
    from align.schema import user

    endless = Sampling(temperature=1.0, max_new_tokens=4000)
    running = [Row(engine.models[seed % 2], [user(" ".join(WORDS))], seed, endless) for seed in range(8)]
    long = Row(engine.models[0], [], 1, text=" ".join(random.Random(0).choices(WORDS, k=2000)))
    with noted_steps() as every:
        stream = engine.submit(GenerationRequest(tuple(running)))
        while len(every) < 10:
            time.sleep(0.01)
        came = len(steps_of(every, len(running)))
        events = list(engine.submit(GenerationRequest((long,), Sampling(temperature=0.0, max_new_tokens=8))))
        stream.cancel()
    end = next(event for event in events if isinstance(event, RowDone))
    between = [after - before for before, after in itertools.pairwise(steps_of(every, len(running)))]
    return max(between[came - 1 :]), statistics.median(between[: came - 1]), end.first_token_seconds, end.text


class Step(NamedTuple):
    """A moment at which tokens of some rows were sampled."""

    rows: int
    wall: float
    processor: float


@contextmanager
def noted_steps() -> Iterator[list[Step]]:
    """Note every step of every engine of this process."""
    from align.engine import batch

    steps: list[Step] = []
    plain = batch.sample_tokens

    def noted(logits: Any, rows: Any) -> Any:
        tokens = plain(logits, rows)
        steps.append(Step(len(rows), time.perf_counter(), time.process_time()))
        return tokens

    batch.sample_tokens = noted
    try:
        yield steps
    finally:
        batch.sample_tokens = plain


def steps_of(steps: list[Step], rows: int) -> list[float]:
    """The times of steps of at least so many rows."""
    return [step.wall for step in steps if step.rows >= rows]


def in_a_process(threads: int, part: str, *words: object, script: str = __file__) -> Any:
    """What one of the functions above finds in a new process."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, "--measure", part, *map(str, words)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{part}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


MEASURES: dict[str, Callable[..., Any]] = {
    "models": lambda folder: write_models(Path(folder)),
    "memory": lambda folder, *names: memory(Path(folder), list(names)),
    "panes": lambda folder, rounds: panes(Path(folder), int(rounds)),
    "throughput": lambda folder, prompts: throughput(Path(folder), int(prompts)),
    "gap": lambda folder, rounds: gap(Path(folder), int(rounds)),
}


def report(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the parts asked for and print a line of each as it is known."""
    found: dict[str, Any] = {}
    if not (folder / "second").exists():
        in_a_process(options.threads, "models", folder)
    if "memory" in options.part:
        one, two = (
            in_a_process(options.threads, "memory", folder, *names)["grown"]
            for names in (["first"], ["first", "second", "base"])
        )
        found["memory"] = {"one_adapter": one, "two_adapters_and_base": two, "ratio": two / one}
        say("memory", "two adapters and base / one adapter", f"{two / 2**20:.0f} / {one / 2**20:.0f} MiB", two / one)
    if "panes" in options.part:
        found["panes"] = in_a_process(options.threads, "panes", folder, options.rounds)
        for label, figures in found["panes"].items():
            span = f"{figures['lowest']:.2f} to {figures['highest']:.2f}"
            say("panes", f"{label}: apart / together", span, figures["ratio"])
    if "throughput" in options.part:
        found["throughput"] = figures = in_a_process(options.threads, "throughput", folder, options.prompts)
        rates = f"{figures['tokens_per_second']:.0f} / {figures['tokens_per_second_alone']:.1f} tokens/s"
        say("throughput", f"{options.prompts} prompts at once / one at a time", rates, figures["ratio"])
    if "gap" in options.part:
        found["gap"] = figures = in_a_process(options.threads, "gap", folder, options.rounds)
        times = [statistics.median(each[0] for each in figures[label]) for label in ("at once", "in parts")]
        say("gap", "longest between tokens: at once / in parts", f"{times[0]:.2f} / {times[1]:.2f} s", figures["ratio"])
        say("gap", "first token of the long prompt: in parts / at once", "", figures["ratio_first_token"])
    return found


def say(part: str, what: str, figures: str, ratio: float) -> None:
    """One line of the table."""
    sys.stdout.write(f"{part:<11}{what:<46}{figures:>26}{ratio:>8.2f}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--measure"]:
        result = MEASURES[sys.argv[2]](*sys.argv[3:])
        sys.stdout.write(f"\n{json.dumps(result)}\n")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["memory", "panes", "throughput", "gap"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="of panes and gap; ratios are their medians")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the random models there for the next time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = report(options, options.models or Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
