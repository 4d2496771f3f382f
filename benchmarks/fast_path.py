"""One training step of a stage on the fast path, beside TRL's own and beside plain full logits, in the real trainer.

    python benchmarks/fast_path.py [--stage dpo kto] [--shape long-prompts] [--vocab 32000] [--steps 5] [--json FILE]

The same batches go through every variant, in turn; a step is forward, backward and every metric TRL logs. Ratios are
medians of the ratios of one round, with the lowest and highest. Losses must agree, or nothing is printed. Peak memory
is that of a process that runs one variant only. Every combination of the stages, shapes and vocabularies given is run.
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
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    CI="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
)

SHAPES = {
    "short-prompts": ((8, 40), (40, 120)),
    "long-prompts": ((240, 360), (40, 80)),
    "lognormal": (None, None),
    "all-tokens": ((1, 2), (200, 300)),
}
"""prompt and answer tokens of a row, lowest and highest"""

STOCK, FULL, FAST = "TRL", "full logits", "align"
ABLATED = {
    "align, prefixes not shared": "shares_prefixes",
    "align, head gradient in the backward pass": "slopes_forward",
    "align, layers as the libraries compose them": "fused",
}
PADDED = {
    "padded, align's head on trained positions": True,
    "padded, align's head on every position": False,
}
"""what align's head alone gives, without packing: on trained positions only, or on all"""


def lengths(rng: random.Random, shape: str) -> tuple[int, int]:
    """Prompt and answer tokens of one row."""
    prompt, answer = SHAPES[shape]
    if prompt is None or answer is None:
        return tuple(max(4, min(400, int(rng.lognormvariate(mean, 0.8)))) for mean in (4.6, 4.0))  # type: ignore[return-value]
    return rng.randint(*prompt), rng.randint(*answer)


def make_rows(stage: str, shape: str, vocab: int, count: int) -> list[dict[str, Any]]:
    """Rows as the stage's trainer reads them, of random tokens."""
    rng = random.Random(0)

    def ids(number: int) -> list[int]:
        return [rng.randrange(8, vocab) for _ in range(number)]

    rows = []
    for _ in range(count):
        asked, answered = lengths(rng, shape)
        prompt, first, second = ids(asked), ids(answered), ids(max(4, answered + rng.randint(-9, 9)))
        if stage == "sft":
            rows.append({"input_ids": prompt + first, "labels": [-100] * asked + first})
        elif stage == "reward":
            rows.append({"chosen_ids": prompt + first, "rejected_ids": prompt + second})
        elif stage == "kto":
            rows.append({"prompt_ids": prompt, "completion_ids": first, "label": len(rows) % 2 == 0})
        else:
            rows.append({"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second})
    return rows


def make_trainer(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    """A TRL trainer over a Llama with a LoRA, its data set in place."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden * 8 // 3, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32, num_key_value_heads=options.hidden // 64, vocab_size=options.vocab,
        max_position_embeddings=1024, tie_word_embeddings=True, num_labels=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    score = options.stage == "reward"
    auto = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS" if score else "CAUSAL_LM")
    model = get_peft_model(auto.from_config(config).requires_grad_(False), lora)
    return trainer_of(options.stage, model, tokenizer(), Dataset.from_list(rows), options.batch)


def trainer_of(stage: str, model: Any, tokenizer: Any, rows: Any, batch: int, *, bf16: bool = False) -> Any:
    """The TRL trainer of a stage on rows that are tokens already."""
    import torch
    from datasets import disable_progress_bars
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from align.kto import add_mismatched
    from align.training.training_data import TokenisedSplits
    from align.training.trl_bridge import build_trainer

    disable_progress_bars()
    args: dict[str, Any] = {
        "output_dir": "unused", "per_device_train_batch_size": batch, "max_length": None, "bf16": bf16,
        "activation_checkpointing": False, "report_to": [], "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    if stage == "sft":
        args |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    if stage == "kto":
        rows = add_mismatched(rows, batch, 0)
    classes: dict[str, tuple[Any, Any]] = {
        "sft": (SFTTrainer, SFTConfig), "reward": (RewardTrainer, RewardConfig), "kto": (KTOTrainer, KTOConfig),
        "dpo": (DPOTrainer, DPOConfig),
    }  # fmt: skip
    trainer_class, config_class = classes[stage]
    return build_trainer(trainer_class, model, tokenizer, config_class(**args), TokenisedSplits(rows))


def tokenizer() -> Any:
    """A tokenizer that the trainers accept; the rows are token ids already."""
    from align.models.scratch import train_tokenizer

    return train_tokenizer(["a b c"] * 20, 300)


def full_logits(base: Any) -> Callable[..., Any]:
    """The forward that makes all logits at once: the fastest way of the stock libraries on a CPU."""
    from torch.nn.functional import log_softmax
    from trl.trainer.utils import FusedCausalLMOutput

    def forward(_self: Any, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **_: Any) -> Any:
        hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits = base.get_output_embeddings()(hidden.last_hidden_state[:, :-1]).float()
        wanted = labels[:, 1:]
        mask = wanted != -100
        scores = log_softmax(logits, -1)
        detached = scores.detach()
        return FusedCausalLMOutput(
            log_probs=scores.gather(2, wanted.clamp(min=0)[..., None])[..., 0] * mask,
            entropy=-(detached.exp() * detached).sum(-1) * mask,
            mean_logits=logits.detach().mean(-1) * mask,
            is_top1=(detached.argmax(-1) == wanted) & mask,
            label_mask=mask,
        )

    return forward


def padded_head(base: Any, trained_only: bool) -> Callable[..., Any]:
    """The stock backbone on the padded batch under align's head: what remains of the fast path without packing."""
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    from align.models.head_scores import score_tokens

    def forward(_self: Any, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **_: Any) -> Any:
        hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        wanted = labels[:, 1:]
        mask = wanted != -100
        chosen = mask if trained_only else torch.ones_like(mask)
        targets = wanted.clamp(min=0)[chosen]
        scores = score_tokens(base.get_output_embeddings(), hidden[:, :-1][chosen], targets, frozen=True)

        def spread(values: Any) -> Any:
            return values.new_zeros(wanted.shape).masked_scatter(chosen, values) * mask

        return FusedCausalLMOutput(
            log_probs=spread(scores.log_probs), entropy=spread(scores.entropy), mean_logits=spread(scores.mean_logits),
            is_top1=spread(scores.is_top1), label_mask=mask,
        )  # fmt: skip

    return forward


def switches(trainer: Any, *, ablations: bool = True) -> dict[str, Callable[[], None]]:
    """What to call before a step to take each variant; without `ablations` the stock paths and ours alone."""
    from align.models.packed import ATTENTION, use_fast_path

    base = trainer.model.get_base_model()
    stock = base.forward
    path = use_fast_path(trainer.model, sys.stderr.write)
    fast = base.forward
    assert path is not None

    def take(forward: Any, attention: str, **parts: bool) -> Callable[[], None]:
        def switch() -> None:
            base.forward = forward
            base.set_attn_implementation(attention)
            path.fused.on = parts.get("fused", forward is fast)
            path.shares_prefixes = parts.get("shares_prefixes", True)
            path.slopes_forward = parts.get("slopes_forward", True)

        return switch

    variants = {STOCK: take(stock, "sdpa"), FAST: take(fast, ATTENTION)}
    if not hasattr(base, "score"):
        variants[FULL] = take(types.MethodType(full_logits(base), base), "sdpa")
    if FULL in variants and ablations:
        variants |= {name: take(fast, ATTENTION, **{part: False}) for name, part in ABLATED.items()}
        variants |= {
            name: take(types.MethodType(padded_head(base, only), base), "sdpa") for name, only in PADDED.items()
        }
    return variants


def step(trainer: Any, batch: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """Loss and seconds of one training step; its gradients stay until the next."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    start = clock()
    loss = trainer.training_step(trainer.model, dict(batch))
    return float(loss), clock() - start


def batches(trainer: Any, count: int) -> list[dict[str, Any]]:
    """The first batches of an epoch."""
    return [batch for _, batch in zip(range(count), trainer.get_train_dataloader(), strict=False)]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every variant on every batch, after one round that does not count."""
    trainer = make_trainer(
        options, make_rows(options.stage, options.shape, options.vocab, options.batch * options.steps)
    )
    variants = switches(trainer)
    trainer.model.train()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number, batch in enumerate([*batches(trainer, 1), *batches(trainer, options.steps)]):
        losses = {}
        for name, switch in variants.items():
            switch()
            losses[name], taken = step(trainer, batch)
            if number:
                seconds[name].append(taken)
        refuse_unequal(losses, 1e-4)
    return summarise(seconds)


def refuse_unequal(numbers: dict[str, float], tolerance: float, what: str = "losses") -> None:
    """End the process when a number of a batch is not that of TRL: what trains other tokens is not compared."""
    first, *others = numbers.values()
    worst = max(abs(other - first) / (1 + abs(first)) for other in others)
    if not worst <= tolerance:
        found = ", ".join(f"{number:.6f} ({name})" for name, number in numbers.items())
        sys.exit(f"not compared: the {what} of one batch differ by {worst:.1e}, {tolerance:g} is allowed: {found}")


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The median seconds of each variant, and how many times as fast as TRL it was in the same rounds."""
    return {
        name: {"seconds": statistics.median(each), **_ratio(seconds[STOCK], each)} for name, each in seconds.items()
    }


def _ratio(stock: list[float], ours: list[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(stock, ours, strict=True))
    return {"times as fast": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def peak(options: argparse.Namespace, variant: str) -> float:
    """Peak resident memory, in MiB beyond what was there before the first step, of a process with one variant."""
    keys = ("stage", "shape", "vocab", "hidden", "layers", "batch")
    shape = [word for key in keys for word in (f"--{key}", str(getattr(options, key)))]
    return measure_peak([__file__, "--only", variant, *shape])["growth"]


def measure_peak(words: list[str]) -> dict[str, float]:
    """What a script that ends with `watch_peak` found, in a process of its own."""
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(options: argparse.Namespace) -> None:
    """Two steps of one variant in this process."""
    trainer = make_trainer(options, make_rows(options.stage, options.shape, options.vocab, options.batch * 2))
    switches(trainer)[options.only]()
    trainer.model.train()
    first_two = batches(trainer, 2)
    watch_peak(lambda: [step(trainer, batch) for batch in first_two])


def watch_peak(work: Callable[[], Any]) -> None:
    """Print the peak of resident memory while something is done, and its growth over what was there, in MiB."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    sys.stdout.write(json.dumps({"peak": round(peak), "growth": round(peak - before)}) + "\n")


def resident() -> float:
    """MiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> int:
    """Print a table, and write it as JSON when asked."""
    options = parser().parse_args()
    cases = [
        argparse.Namespace(**vars(options) | {"stage": stage, "shape": shape, "vocab": vocab})
        for stage, shape, vocab in itertools.product(options.stage, options.shape, options.vocab)
    ]
    if options.only:
        run_alone(cases[0])
        return 0
    results = [run_case(case) for case in cases]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--stage", nargs="+", choices=["sft", "reward", "dpo", "kto"], default=["dpo"])
    found.add_argument("--shape", nargs="+", choices=SHAPES, default=["long-prompts"])
    found.add_argument("--vocab", nargs="+", type=int, default=[32_000])
    found.add_argument("--hidden", type=int, default=256)
    found.add_argument("--layers", type=int, default=6)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--steps", type=int, default=5)
    found.add_argument("--json", type=Path)
    found.add_argument("--only", help=argparse.SUPPRESS)
    return found


def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the variants on one stage, shape and vocabulary, and print the table."""
    found = compare(options)
    for name in (STOCK, FULL, FAST):
        if name in found:
            found[name]["peak MiB"] = peak(options, name)
    sys.stdout.write(f"{options.stage}, {options.shape}, vocabulary {options.vocab}\n")
    for name, numbers in found.items():
        spread = f"{numbers['times as fast']:5.2f}x [{numbers['lowest']:.2f}, {numbers['highest']:.2f}]"
        memory = f"{numbers['peak MiB']:8.0f} MiB" if "peak MiB" in numbers else ""
        sys.stdout.write(f"{numbers['seconds']:8.2f} s  {spread:<22}{memory:<14}{name}\n")
    sys.stdout.flush()
    shape = {key: value for key, value in vars(options).items() if key not in ("json", "only")}
    return shape | {"result": found}


if __name__ == "__main__":
    sys.exit(main())
