"""The memory estimate of a training step against the measured peak of a real run, each in a process of its own.

    python benchmarks/memory_plan.py            # all cases: about four minutes on two cores
    python benchmarks/memory_plan.py tiny-lora  # one
    python benchmarks/memory_plan.py --base FOLDER  # those of a real base (align registry add smollm2)

Measured is the growth of the process's largest resident size from before the model is loaded, after the same stage has
run once with a model of two layers, so that imports and libraries' own buffers are not counted. Rows have unequal
lengths, as real ones do. The same case differs by a tenth from run to run: what lies in holes of the heap does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.command_line import read_command_line
from align.config import build
from align.models.tokenizers import load_tokenizer
from align.registry import open_registry
from align.training.command import run_stage
from align.training.planned_step import PlannedStep
from align.training.ranks import Ranks
from align.training.training_data import TrainingData

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}

TINY = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip


STEPS = 8

LOG_NORMAL = (5.0, 0.7)
"""mean and deviation of the logarithms of the lengths of real demonstrations (alpaca's: median 148, 5 % above 470)"""


@dataclass(frozen=True)
class Case:
    """A model, a batch and the settings of a run; `stage` is sft, or dpo on pairs."""

    size: dict[str, int] | None
    """of a new Llama; None takes the real base"""
    rows: int
    tokens: int
    words: list[str] = field(default_factory=list)
    stage: str = "sft"
    base: str = ""
    """the folder of the real base, whose rows have the lengths of real ones"""


CASES = {
    "tiny-lora": Case(TINY, 8, 512),
    "tiny-full": Case(TINY, 8, 512, ["lora=none"]),
    "100m-lora": Case(LARGE, 4, 256),
    "100m-lora-long": Case(LARGE, 2, 512),
    "100m-lora-checkpointing": Case(LARGE, 4, 256, ["gradient_checkpointing=true"]),
    "100m-lora-bf16": Case(LARGE, 4, 256, ["bf16=true"]),
    "100m-lora-nf4": Case(LARGE, 4, 256, ["quantization=nf4"]),
    "100m-lora-int8": Case(LARGE, 4, 256, ["quantization=int8"]),
    "100m-lora-nf4-checkpointing": Case(LARGE, 4, 256, ["quantization=nf4", "gradient_checkpointing=true"]),
    "100m-full": Case(LARGE, 2, 256, ["lora=none"]),
    "tiny-lora-stock": Case(TINY, 8, 512, ["fast_path=false"]),
    "100m-lora-stock": Case(LARGE, 4, 256, ["fast_path=false"]),
    "100m-full-stock": Case(LARGE, 2, 256, ["lora=none", "fast_path=false"]),
}
ARITHMETIC = {"fp32": ["bf16=false"], "bf16": ["bf16=true"]}
REAL = {
    f"{stage}-{name}{'-checkpointing' if again else ''}": Case(
        None, 4, 512, [*words, f"gradient_checkpointing={again}"], stage
    )
    for stage in ("sft", "dpo") for name, words in ARITHMETIC.items() for again in (False, True)
}  # fmt: skip


def compare(case: Case) -> dict[str, Any]:
    """Estimated and measured bytes of one case, measured in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(asdict(case))],
        capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, Any]:
    """Run the stage in this process and compare its peak with the estimate of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = _write_base(root / "warm", TINY)
        if case.size is None:
            (root / "base").symlink_to(case.base)
            tokenizer = load_tokenizer(open_registry(root / "registry").resolve(str(root / "base")))
        else:
            _write_base(root / "base", case.size)
        _write_rows(root / "rows.jsonl", tokenizer, case)
        peaks = _watch_peaks()
        _train(root, "warm", case)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        _train(root, "base", case)
        return {"estimate": _estimate(root, case), "measured": peaks[-1] - before}


def _estimate(root: Path, case: Case) -> dict[str, int]:
    """What `--dry-run` prints for the same run."""
    stage, registry = _stage(case), open_registry(root / "registry")
    config = build(stage.config, _settings(root, "base", case))
    base = registry.resolve(config.model)
    data = TrainingData(stage, config, registry, Ranks(), notify=lambda _: None)
    rows = data.tokenise_records(data.train, load_tokenizer(base), root / "cache")
    return PlannedStep(stage, config, registry, base, rows).memory(config)


def _stage(case: Case) -> Any:
    return importlib.import_module(f"align.{case.stage}").STAGE


def _write_base(folder: Path, size: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.models.loading import save_base
    from align.models.scratch import train_tokenizer

    tokenizer = train_tokenizer(["seven is a number"])
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(**size, max_position_embeddings=2048, tie_word_embeddings=True, **special)
    save_base(LlamaForCausalLM(config), tokenizer, folder)
    return tokenizer


def _write_rows(path: Path, tokenizer: Any, case: Case) -> None:
    """Every other row fills the length, the rest half of it, or they are as long as real ones; a 7 is one token."""

    def chat(row: int, sevens: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{row:03}"}, {"role": "assistant", "content": "7" * sevens}]

    around = len(tokenizer.apply_chat_template(chat(0, 0), tokenize=True, return_dict=False))
    count = STEPS * case.rows
    lengths = [case.tokens // (1 + row % 2) for row in range(count)]
    if case.size is None:
        drawn = random.Random(0)
        lengths = [min(case.tokens, around + 8 + int(drawn.lognormvariate(*LOG_NORMAL))) for _ in range(count)]
    rows: list[dict[str, Any]] = []
    for row, length in enumerate(lengths):
        asked, answer = chat(row, length - around)
        if case.stage == "sft":
            rows.append({"messages": [asked, answer]})
        else:
            sevens = chat(row, lengths[row - 1] - around - 1)[1]["content"]
            # What answers begin with alike would be computed once.
            rows.append({"prompt": [asked], "chosen": [answer], "rejected": [answer | {"content": "8" + sevens}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _settings(root: Path, base: str, case: Case) -> dict[str, Any]:
    words = [
        f"model={root / base}", f"data={root / 'rows.jsonl'}", f"name={base}", "bf16=false", f"max_steps={STEPS}",
        "save_steps=0", "on_long=drop",
        f"max_length={case.tokens}", f"per_device_train_batch_size={case.rows}", *case.words,
    ]  # fmt: skip
    return read_command_line(words).values


def _train(root: Path, base: str, case: Case) -> None:
    stage = _stage(case)
    with contextlib.redirect_stdout(io.StringIO()):
        run_stage(stage, build(stage.config, _settings(root, base, case)), open_registry(root / "registry"))


def _watch_peaks() -> list[int]:
    """The largest resident size while steps are made, one entry a run from now on."""
    from transformers import TrainerCallback

    from align.training import loop

    peaks: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

        def on_train_end(self, *_: Any, **__: Any) -> None:
            peaks.append(_status("VmHWM"))

    train = loop.train

    def watched(run: Any, trainer: Any) -> Any:
        trainer.add_callback(Watch())
        return train(run, trainer)

    loop.train = watched
    return peaks


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Case(**json.loads(sys.argv[2])))))
        return
    words, cases = sys.argv[1:], CASES
    if words[:1] == ["--base"]:
        cases = {name: replace(case, base=str(Path(words[1]).resolve())) for name, case in REAL.items()}
        words = words[2:]
    for name in words or cases:
        found = compare(cases[name])
        parts = {part: round(size / 2**20) for part, size in found["estimate"].items()}
        measured = found["measured"] / 2**20
        print(f"{name:<24} estimated {parts['total']:>5} MiB, measured {measured:5.0f} MiB, "
              f"{parts['total'] / measured - 1:+.0%}  {parts}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
