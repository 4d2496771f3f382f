"""Supervised fine-tuning: teach a model to answer as the demonstrations do.

The loss is the mean negative log-likelihood of the assistant's tokens, stop token included; prompts are context only.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar

from align.peft_config import PeftStageConfig
from align.training.command import main
from align.training.stage import Stage, Trained, select_metrics

if TYPE_CHECKING:
    from align.training.run import Run


class SftConfig(PeftStageConfig):
    """Settings of supervised fine-tuning."""

    full_training: ClassVar[bool] = True

    packing: bool = False
    """put several demonstrations into one row of max_length tokens, each attending to itself only"""


def sft(config: SftConfig, run: Run) -> Trained:
    """Fine-tune an adapter, or every weight, on demonstrations."""
    from trl import SFTConfig, SFTTrainer

    from align.models.adapters import start_policy
    from align.models.loading import Precision
    from align.models.lora_starts import start_from_data
    from align.training.loop import train
    from align.training.training_data import pack_rows, packed_collator, prove_packing
    from align.training.trl_bridge import build_trainer, trl_arguments

    # 1. Data: records seen as demonstrations; read and checked before any weight is loaded.
    run.data.read()

    # 2. Models: the start's own adapter goes on training; over a bare base a new one begins as a no-op. Without an
    #    adapter every weight of the base is trained.
    loaded = start_policy(run.registry, run.parent, config.new_adapter, Precision.of(config))
    data = run.data.tokenise(loaded.tokenizer)
    start_from_data(loaded, data.train)
    if config.packing:
        prove_packing(loaded.model, loaded.tokenizer)
        data = data._replace(train=pack_rows(data.train, config.max_length))
        run.print_line(f"packed into {len(data.train)} rows of up to {config.max_length} tokens")

    # 3. Optimise: TRL owns the loop; our token masks are its labels.
    args = trl_arguments(
        SFTConfig, run, max_length=None, packing=False, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    collator = packed_collator(loaded.tokenizer) if config.packing else None
    trainer = build_trainer(SFTTrainer, loaded.model, loaded.tokenizer, args, data, data_collator=collator)
    numbers = train(run, trainer)

    # 4. Hand back the adapter and the numbers worth keeping.
    kept = select_metrics(numbers, "loss", "mean_token_accuracy", "eval_loss")
    return Trained.of(loaded, config, metrics=kept, parents=[run.parent])


STAGE = Stage(
    "sft", SftConfig, sft, view="demonstration", columns="labels", produces="policy", trl_config="SFTConfig",
    next_command="align dpo --model {name} --data PREFERENCES --name {name}-dpo{settings}",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(STAGE))
