"""Training steps of a real model on rows of real lengths: TRL, TRL's fastest way on a CPU, and align, in turn.

    align registry add smollm2
    python benchmarks/real_model.py [--stage sft dpo kto reward ppo] [--dtype fp32 bf16] [--data FILE] [--json FILE]

The same batches go through every variant in one process; a step is forward, backward and every metric TRL logs, over
one base with one LoRA adapter, at the same flags (no gradient checkpointing; with bf16 a bf16 base for TRL too, which
is faster than its default). Before anything is timed the losses and gradient norms of a batch must agree, else the
benchmark ends with exit code 1. Ratios are medians of rounds in processor seconds, with the lowest and highest; peak
memory is that of a process that runs one variant only. Rows are generated, with the lengths of instruction data
(log-normal), unless `--data` names a file. PPO is in `real_ppo.py`: its phases beside a loop around `generate()`.

With `--trl-tokenises` TRL prepares its rows itself, from the same conversations. Its losses are others then: what it
trains beside our tokens is printed, and nothing is compared.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fast_path import (
    FAST,
    STOCK,
    batches,
    measure_peak,
    refuse_unequal,
    step,
    summarise,
    switches,
    trainer_of,
    watch_peak,
)

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""relative difference of losses that rounding explains"""
NORM_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}
ANSWER_COLUMNS = ("chosen_ids", "rejected_ids", "completion_ids")
PROMPT_TOKENS, ANSWER_TOKENS = (3.9, 0.6), (4.6, 0.9)
"""mean and deviation of the logarithm of generated lengths, much as in Alpaca without its shortest answers"""


def write_rows(path: Path, stage: str, count: int) -> Path:
    """Write conversations of the small world with log-normal lengths, as the stage reads them."""
    from align.world.facts import questions
    from align.world.wording import AnswerStyle, Faults, answer, ask, product_page

    rng = random.Random(0)
    asked = [question for question in questions() if question.language == "en"]

    def text(start: str, size: tuple[float, float]) -> str:
        """A text of about so many tokens, of sentences about products."""
        wanted = min(400, int(rng.lognormvariate(*size)))
        while 1.2 * len(start.split()) < wanted:
            start += " " + product_page(rng, rng.choice(asked).product, "en", 0.1)
        return " ".join(start.split()[: max(4, round(wanted / 1.2))])

    rows = []
    for number in range(count):
        question = rng.choice(asked)
        prompt = text(ask(rng, question), PROMPT_TOKENS)
        good, bad = (
            text(answer(rng, question, style), ANSWER_TOKENS)
            for style in (AnswerStyle(), Faults(0.5, 0.3, 0.3).sample(rng))
        )
        if stage in ("dpo", "reward"):
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
        elif stage == "kto":
            rows.append({"prompt": prompt, "completion": good, "label": number % 2 == 0})
        else:
            rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_records(options: argparse.Namespace, stage: str, folder: Path, count: int) -> Any:
    """The first records of `--data`, or generated ones, as the stage views them: more than needed, as some are long."""
    from align.data import load_records

    source = options.data or str(write_rows(folder / f"{stage}.jsonl", stage, 8 * count))
    view = importlib.import_module(f"align.{stage}").STAGE.view
    return load_records([f"{source}:limit={8 * count}"], view=view)


def token_rows(options: argparse.Namespace, stage: str, records: Any, tokenizer: Any, folder: Path, count: int) -> Any:
    """The records as align's stage trains them: `count` rows, those above `--max-length` left out."""
    from align.data.tokenise import TokenPlan, tokenise

    shape = importlib.import_module(f"align.{stage}").STAGE
    plan = TokenPlan(shape.view, options.max_length, "drop", shape.columns)
    rows = tokenise(records, tokenizer, plan, cache=folder / "tokens").rows
    if len(rows) < count:
        source = options.data or "generated rows"
        sys.exit(f"{source}: {len(rows)} rows of at most {options.max_length} tokens, {count} needed; give more")
    if options.trl_tokenises and len(rows) < len(records.records):
        sys.exit(f"--trl-tokenises: some rows are longer than {options.max_length} tokens; raise --max-length")
    return rows.select(range(count))


def trl_rows(stage: str, records: Any, tokenizer: Any, count: int) -> Any:
    """The same conversations as TRL's trainer prepares them itself."""
    import trl
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    disable_progress_bars()
    fields = {"sft": ("prompt", "completion"), "kto": ("prompt", "completion", "label")}
    names = fields.get(stage, ("prompt", "chosen", "rejected"))
    rows = [{name: getattr(record, name) for name in names} for record in records.records[:count]]
    name = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}[stage]
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    args = getattr(trl, f"{name}Config")(
        output_dir="unused", use_cpu=True, bf16=False, report_to=[], max_length=None, activation_checkpointing=False
    )
    adapter = LoraConfig() if stage in ("dpo", "kto") else None  # else they load a reference by the model's name
    trainer = getattr(trl, f"{name}Trainer")(
        auto.from_config(tiny), args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        peft_config=adapter,
    )  # fmt: skip
    return trainer.train_dataset


def describe_difference(stage: str, ours: Any, theirs: Any, tokenizer: Any) -> list[str]:
    """What TRL trains, or scores at, that align does not, decoded: a line for each kind; none where all is equal."""
    found: dict[str, int] = {}
    for mine, other in zip(ours, theirs, strict=True):
        for column in ["labels"] if stage == "sft" else [key for key in ANSWER_COLUMNS if key in mine]:
            own, given = ([token for token in row[column] if token >= 0] for row in (mine, other))
            if given[: len(own)] == own and given != own:
                line = f"{tokenizer.decode(given[len(own) :])!r} after {tokenizer.decode(own[-1:])!r}"
            else:
                line = f"{tokenizer.decode(given)!r} in place of {tokenizer.decode(own)!r}"
            if given != own:
                found[line] = found.get(line, 0) + 1
    return [f"TRL trains beside align's tokens: {line}, in {count} answers" for line, count in found.items()]


def load_trainer(options: argparse.Namespace, stage: str, dtype: str, folder: Path, count: int) -> tuple[Any, Any]:
    """The trainer of a stage over the model with a random adapter, and rows where TRL prepares other ones, else None.

    With an adapter that begins as a no-op DPO's loss would be ln 2 whatever the tokens are.
    """
    import torch

    from align.config import LoraSettings
    from align.kto import add_mismatched
    from align.models.adapter_config import adapter_parameters
    from align.models.adapters import start_policy
    from align.models.heads import start_reward
    from align.models.loading import Precision
    from align.registry import open_registry

    torch.manual_seed(0)
    registry = open_registry(options.registry)
    start = start_reward if stage == "reward" else start_policy
    loaded = start(registry, registry.resolve(options.model), LoraSettings(), Precision(bf16=dtype == "bf16"))
    records = read_records(options, stage, folder, count)
    rows = token_rows(options, stage, records, loaded.tokenizer, folder, count)
    theirs = trl_rows(stage, records, loaded.tokenizer, count) if options.trl_tokenises else rows
    lines = describe_difference(stage, rows, theirs, loaded.tokenizer)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    trainer = trainer_of(stage, loaded.model, loaded.tokenizer, rows, options.batch, bf16=dtype == "bf16")
    for parameter in adapter_parameters(loaded.model, "default"):
        parameter.data.normal_(std=0.01)  # now, as TRL has made the reference from what was there before
    trainer.model.train()
    if stage == "kto" and lines:
        theirs = add_mismatched(theirs.select_columns(rows.column_names), options.batch, 0)
    return trainer, theirs if lines else None


def check_first_step(options: argparse.Namespace, stage: str, dtype: str) -> float:
    """Return TRL's loss of a first batch; ends the process where another variant trains anything else."""
    return _open_case(options, stage, dtype)[-1]


def _open_case(options: argparse.Namespace, stage: str, dtype: str) -> tuple[Any, dict[str, Any], list[Any], float]:
    """The trainer of a case, its variants, its batches, and TRL's loss of the first, which is that of all variants."""
    with TemporaryDirectory() as folder:
        trainer, theirs = load_trainer(options, stage, dtype, Path(folder), options.batch * options.rounds)
        variants = switches(trainer, ablations=False)
        given = batches(trainer, options.rounds)
        first = given[0]
        if theirs is not None:
            trainer.train_dataset = theirs
            first = batches(trainer, 1)[0]
    loss = require_equal(trainer, variants, given[0], first, dtype)
    if theirs is not None:
        sys.exit("not compared: TRL trains other tokens than align")
    return trainer, variants, given, loss


def compare(options: argparse.Namespace, stage: str, dtype: str) -> dict[str, Any]:
    """Processor seconds of every variant on every batch, once a first batch has shown that all train the same."""
    trainer, variants, given, loss = _open_case(options, stage, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for batch in given:
        for name, switch in variants.items():
            switch()
            seconds[name].append(step(trainer, batch, time.process_time)[1])
    tokens = sum(int(batch["attention_mask"].sum()) for batch in given if "attention_mask" in batch)
    padded = sum(batch["attention_mask"].numel() for batch in given if "attention_mask" in batch)
    return summarise(seconds) | {"batches": {"tokens": tokens, "padded": padded, "loss": loss}}


def require_equal(trainer: Any, variants: dict[str, Any], ours: Any, stock: Any, dtype: str) -> float:
    """Return TRL's loss of a batch; ends the process when another variant has another loss or gradient norm."""
    losses, norms = {}, {}
    for name, switch in variants.items():
        switch()
        losses[name] = step(trainer, stock if name == STOCK else ours)[0]
        norms[name] = gradient_norm(trainer.model)
    refuse_unequal(losses, TOLERANCE[dtype])
    refuse_unequal(norms, NORM_TOLERANCE[dtype], "gradient norms")
    return losses[STOCK]


def gradient_norm(model: Any) -> float:
    """The norm of all gradients together."""
    import torch

    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm())


def run_alone(options: argparse.Namespace) -> None:
    """Two steps of one variant in this process, whose peak is printed."""
    stage, dtype = options.stage[0], options.dtype[0]
    with TemporaryDirectory() as folder:
        if stage == "ppo":
            from real_ppo import rollout_and_update

            watch_peak(rollout_and_update(options, dtype, Path(folder), plain=options.only != FAST))
            return
        trainer, _ = load_trainer(options, stage, dtype, Path(folder), 2 * options.batch)
        switches(trainer, ablations=False)[options.only]()
        first_two = batches(trainer, 2)
        watch_peak(lambda: [step(trainer, batch) for batch in first_two])


def run_case(options: argparse.Namespace, stage: str, dtype: str) -> dict[str, Any]:
    """Compare the variants on one stage in one precision, and print the table."""
    if stage == "ppo":
        from real_ppo import compare_phases

        found = compare_phases(options, dtype)
    else:
        found = compare(options, stage, dtype)
    facts = found.pop("batches")
    if not options.no_memory:
        for name in (name for name in found if not name.startswith(" ")):
            found[name] |= measure_peak(words_of(options, stage, dtype, name))
    sys.stdout.write(f"{stage}, {dtype}, {options.rounds} rounds of {options.batch} rows, {facts}\n")
    for name, numbers in found.items():
        spread = f"{numbers['times as fast']:5.2f}x [{numbers['lowest']:.2f}, {numbers['highest']:.2f}]"
        memory = f"{numbers['peak']:6.0f} MiB, {numbers['growth']:6.0f} in steps" if "peak" in numbers else ""
        sys.stdout.write(f"{numbers['seconds']:8.2f} s  {spread:<22}{memory:<30}{name}\n")
    sys.stdout.flush()
    return {"stage": stage, "dtype": dtype, "batch": options.batch, "batches": facts, "result": found}


def words_of(options: argparse.Namespace, stage: str, dtype: str, variant: str) -> list[str]:
    """The command that runs one variant of a case alone."""
    keys = ("registry", "model", "data", "batch", "max_length", "answer")
    given = [(key, getattr(options, key)) for key in keys if getattr(options, key) is not None]
    words = [word for key, value in given for word in (f"--{key.replace('_', '-')}", str(value))]
    return [__file__, "--only", variant, "--stage", stage, "--dtype", dtype, *words]


def main() -> int:
    """Print a table for each stage and precision, and write all as JSON when asked."""
    options = parser().parse_args()
    if options.only:
        run_alone(options)
        return 0
    results = [run_case(options, stage, dtype) for dtype in options.dtype for stage in options.stage]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["sft", "dpo", "kto", "reward", "ppo"]
    found.add_argument("--stage", nargs="+", choices=stages, default=stages)
    found.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=["fp32"])
    found.add_argument("--registry", default="align_registry", help="where the model is registered")
    found.add_argument("--model", default="smollm2", help="a registry reference, or a folder")
    found.add_argument("--data", help="a dataset of align that fits the stages, in place of generated rows")
    found.add_argument("--batch", type=int, default=4, help="rows of a batch")
    found.add_argument("--rounds", type=int, default=3, help="batches that are timed")
    found.add_argument("--max-length", type=int, default=512, help="longer rows are left out")
    found.add_argument("--answer", type=int, default=64, help="tokens that PPO samples at most")
    found.add_argument("--trl-tokenises", action="store_true", help="let TRL prepare its rows, and say what differs")
    found.add_argument("--no-memory", action="store_true", help="start no processes to measure memory in")
    found.add_argument("--json", type=Path)
    found.add_argument("--only", help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    sys.exit(main())
