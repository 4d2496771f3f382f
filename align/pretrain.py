"""Pretraining: a small base model and its tokenizer from nothing but text.

The loss is the mean negative log-likelihood of every token. Meant for small worlds and for tests: a base of general use
takes more text and time than one machine gives.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from align.config import Scheduler, TrainerStageConfig, write
from align.errors import UsageError
from align.models.scratch import find_preset
from align.training.stage import Stage, Trained, keep, main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from align.data.render import Rendered
    from align.registry import Registry
    from align.schema import Record
    from align.training.run import Run

SCRATCH = "scratch:"


class PretrainConfig(TrainerStageConfig):
    """Settings of pretraining; the new model is trained in full, so `lora` and `quantization` do not apply."""

    model: str = "scratch:nano"
    """what to build: scratch:tiny, scratch:nano, scratch:micro or scratch:mini"""
    vocab_size: int = Field(768, ge=262)
    """tokens of the new tokenizer, bytes and control tokens included"""
    block_size: int = Field(128, ge=8)
    """tokens in a training row; documents are packed, with an end token after each"""
    max_length: int = Field(512, gt=8)
    """positions of the new model"""
    learning_rate: float = Field(3e-3, gt=0, le=1)
    """peak learning rate; a million parameters bear more than a large model"""
    lr_scheduler_type: Scheduler = "linear"
    """schedule, by its transformers name"""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """share of the steps spent warming up"""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay"""
    logging_steps: int = Field(50, ge=1)
    """steps between two lines of metrics.jsonl"""
    save_steps: int = Field(1000, ge=0)
    """steps between two checkpoints; 0 saves none"""

    @property
    def references(self) -> dict[str, str]:
        """Nothing: it starts from scratch."""
        return {}

    @property
    def preset(self) -> str:
        """The preset that `model` names."""
        return self.model.removeprefix(SCRATCH)

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        if not value.startswith(SCRATCH):
            raise UsageError(f"model={value}: pretraining starts from nothing; give scratch:PRESET, or use align.sft")
        find_preset(value.removeprefix(SCRATCH))
        return value

    @field_validator("lora", "quantization")
    @classmethod
    def _refuse_adapter_settings(cls, value: Any) -> Any:
        raise UsageError(f"lora, quantization: found {value!r}; a new model is trained in full; remove the setting")


def pretrain(config: PretrainConfig, run: Run) -> Trained:
    """Train a new base on text."""
    from transformers import Trainer, TrainingArguments

    from align.data.render import render_texts
    from align.models.scratch import build_base, train_tokenizer
    from align.training.arguments import trl_arguments

    # 1. Data: documents, and conversations written out by the chat template; the tokenizer learns from both.
    records = run.records().records
    tokenizer = train_tokenizer(texts_of(records), config.vocab_size)
    train_set = blocks_of(run.count_dropped(render_texts(records, tokenizer, config.block_size)))
    held_out = None
    if config.eval_data:
        kept_back = run.records(config.eval_data).records
        held_out = blocks_of(run.count_dropped(render_texts(kept_back, tokenizer, config.block_size)))

    # 2. Model: random weights in the shape of a preset.
    model = build_base(config.preset, tokenizer, config.max_length)
    run.say(f"{config.preset}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(train_set)} blocks")

    # 3. Optimise: the trainer owns the loop; rows are all of one length, so it pads nothing.
    trainer = Trainer(
        model=model,
        args=trl_arguments(TrainingArguments, config, run, adam_beta2=0.99),
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    numbers = run.train(trainer)
    if held_out is not None:
        numbers |= measure(trainer)

    # 4. Hand back the whole model; it is a base, so it has no parent and no adapter.
    kept = keep(numbers, "loss", "eval_loss", "perplexity")
    return Trained(model, tokenizer, base=None, adapter=None, metrics=kept)


def texts_of(records: list[Record]) -> Iterator[str]:
    """The text a tokenizer learns from: that of documents, and of every turn of a conversation."""
    for record in records:
        if record.text is not None:
            yield record.text
        else:
            yield from (message["content"] for message in [*record.prompt, *(record.completion or [])])


def blocks_of(rendered: Rendered) -> list[dict[str, Any]]:
    """Packed rows as the trainer takes them: every token is a label."""
    import torch

    rows = [torch.tensor(row["input_ids"]) for row in rendered.rows]
    return [{"input_ids": row, "labels": row} for row in rows]


def measure(trainer: Any) -> dict[str, float]:
    """Loss and perplexity on the held-out text."""
    loss = trainer.evaluate()["eval_loss"]
    return {"eval_loss": loss, "perplexity": math.exp(loss)}


def plan(config: PretrainConfig, registry: Registry) -> None:
    """Print what a run would train on, without training."""
    from align.data import load_records
    from align.data.render import render_texts
    from align.models.scratch import build_base, train_tokenizer

    roots = {"registry": registry.root}
    found = load_records(config.data, view="text", on_bad_row=config.on_bad_row, roots=roots)
    tokenizer = train_tokenizer(texts_of(found.records), config.vocab_size)
    blocks = len(render_texts(found.records, tokenizer, config.block_size).rows)
    steps = math.ceil(math.ceil(blocks / config.rows_per_step) * config.num_train_epochs)
    lines = {
        "start": f"{config.model}, {build_base(config.preset, tokenizer).num_parameters():,} new parameters",
        "data": f"{found.name}: {len(found.records)} rows, dropped {found.dropped}",
        "tokens": f"{blocks * config.block_size} an epoch",
        "steps": f"{steps if config.max_steps < 0 else config.max_steps} of {config.rows_per_step} blocks",
    }
    for key, text in lines.items():
        write(f"{key:<10} {text}")


STAGE = Stage(
    "pretrain", PretrainConfig, pretrain, view="text", produces="base", trl_config="TrainingArguments",
    next_command="python -m align.sft --model {name} --data DEMONSTRATIONS --name {name}-sft",
    plan=plan,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
