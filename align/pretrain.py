"""Pretraining: a small base from nothing but text, or an existing base taken further on more of it.

The loss is the mean negative log-likelihood of every token. From nothing it is meant for small worlds and for tests: a
base of general use takes more text and time than one machine gives.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from align.config import LoraSettings, Scheduler
from align.errors import UsageError
from align.models.scratch import find_preset
from align.peft_config import PeftStageConfig
from align.training.command import main
from align.training.stage import Stage, Trained, select_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from align.data import RecordSet
    from align.schema import Record
    from align.training.plan import Outline
    from align.training.run import Run

SCRATCH = "scratch:"


class PretrainConfig(PeftStageConfig):
    """Settings of pretraining."""

    full_training: ClassVar[bool] = True
    row_setting: ClassVar[str] = "block_size"

    model: str = "scratch:nano"
    """what to build: scratch:tiny, scratch:nano, scratch:micro or scratch:mini; or the base to continue"""
    vocab_size: int = Field(768, ge=262)
    """tokens of the new tokenizer, bytes and control tokens included"""
    block_size: int = Field(128, ge=8)
    """tokens in a training row; documents are packed, with an end token after each"""
    max_length: int = Field(512, gt=8)
    """positions of a new model"""
    lora: LoraSettings | None = None
    """shape of an adapter to train over the base that is continued; none trains every weight"""
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
        """The base that is continued; nothing for a new model."""
        return {} if self.preset else {"model": self.model}

    @property
    def preset(self) -> str | None:
        """The preset that `model` names, if it does not name a base."""
        return self.model.removeprefix(SCRATCH) if self.model.startswith(SCRATCH) else None

    @field_validator("model")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value.startswith(SCRATCH):
            find_preset(value.removeprefix(SCRATCH))
        return value

    @model_validator(mode="after")
    def _check_scratch(self) -> Self:
        if self.preset is None:
            return self
        if self.new_adapter is not None or self.quantization != "none":
            raise UsageError(
                f"lora, quantization: {self.model} is new and trained in full; remove them, or give a base as model"
            )
        if self.block_size > self.max_length:
            raise UsageError(
                f"block_size={self.block_size}: the new model holds max_length={self.max_length} positions; "
                "lower the first or raise the second"
            )
        return self


def pretrain(config: PretrainConfig, run: Run) -> Trained:
    """Train a new base on text, or continue one."""
    from transformers import Trainer, TrainingArguments

    from align.models.adapters import start_policy
    from align.models.loading import Precision
    from align.models.lora_starts import start_from_data
    from align.training.loop import train
    from align.training.trl_bridge import build_trainer, trl_arguments

    # 1. Data: documents, and conversations written out by the chat template; a new tokenizer learns from both.
    run.data.read()

    # 2. Model: random weights in the shape of a preset, or the base to continue, in full or under an adapter.
    loaded = None if config.preset else start_policy(run.registry, run.parent, config.new_adapter, Precision.of(config))
    model, tokenizer = (loaded.model, loaded.tokenizer) if loaded else _build_model(config, run.data.train)
    data = run.data.tokenise(tokenizer)
    if loaded is not None:
        start_from_data(loaded, data.train)
    sizes = f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(data.train)} blocks"
    run.print_line(f"{config.model}: {sizes}")

    # 3. Optimise: the trainer owns the loop; rows are all of one length, so it pads nothing.
    args = trl_arguments(TrainingArguments, run, adam_beta2=0.99, remove_unused_columns=False, label_names=["labels"])
    trainer = build_trainer(Trainer, model, tokenizer, args, data, data_collator=collate_blocks)
    numbers = train(run, trainer)
    if data.held_out is not None:
        loss = trainer.evaluate()["eval_loss"]
        numbers |= {"eval_loss": loss, "perplexity": math.exp(loss)}

    # 4. Hand back the whole model as a base, or the adapter over the one that was continued.
    kept = select_metrics(numbers, "loss", "eval_loss", "perplexity")
    if loaded is None:
        return Trained(model, tokenizer, None, None, metrics=kept)
    return Trained.of(loaded, config, metrics=kept, parents=[run.parent])


def _build_model(config: PretrainConfig, records: RecordSet) -> tuple[Any, Any]:
    """Return a new model and its tokenizer, learned from the training text."""
    from align.models.scratch import build_base, train_tokenizer

    assert config.preset is not None
    tokenizer = train_tokenizer(select_texts(records.records), config.vocab_size)
    return build_base(config.preset, tokenizer, config.max_length), tokenizer


def collate_blocks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return blocks of one length as a batch in which every token is a label."""
    import torch

    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def select_texts(records: list[Record]) -> Iterator[str]:
    """Yield the text a tokenizer learns from: that of documents, and of every turn of a conversation."""
    for record in records:
        if record.text is not None:
            yield record.text
        else:
            yield from (message["content"] for message in [*record.prompt, *(record.completion or [])])


def outline(config: PretrainConfig, records: RecordSet) -> Outline:
    """Return a new model's tokenizer and size, for the plan."""
    import torch

    from align.training.plan import Outline

    with torch.device("meta"):
        model, tokenizer = _build_model(config, records)
    parameters = model.num_parameters()
    return Outline(f"{config.model}, new", tokenizer, parameters, parameters)


STAGE = Stage(
    "pretrain", PretrainConfig, pretrain, view="text", head="full", produces="base", trl_config="TrainingArguments",
    next_command="align sft --model {name} --data DEMONSTRATIONS --name {name}-sft{settings}",
    outline=outline,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
