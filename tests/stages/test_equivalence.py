"""Our stages beside the plain libraries, and beside themselves cut in other ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from align import dpo, sft
from align.data import load_records
from align.data.rendering.render_view import render_view
from align.registry import Registry, open_registry
from align.training.command import main

STEPS = 8
COMMON = {
    "learning_rate": 1e-3, "max_steps": STEPS, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine",
    "seed": 3, "max_grad_norm": 1.0,
}  # fmt: skip


def words(**settings: object) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def run(stage, root: Path, **settings: object) -> Path:
    arguments = COMMON | {"bf16": "false", "logging_steps": 1, "lora.r": 4, "fast_path": "false"} | settings
    assert main(stage, ["--registry", str(root), *words(**arguments)]) == 0
    return Path(open_registry(root).resolve(str(settings["name"])).location)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_base, demonstrations) -> Registry:
    """A registry with the adapter `start`, from which both sides continue."""
    root = tmp_path_factory.mktemp("equivalence")
    run(sft.STAGE, root, model=tiny_base, data=demonstrations, name="start", max_steps=2)
    return open_registry(root)


def plain_model(registry: Registry, tiny_base: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, registry.resolve("start").location, is_trainable=True)


def plain_losses(trainer) -> list[float]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def plain_arguments(folder: Path) -> dict:
    return COMMON | {
        "output_dir": str(folder), "warmup_steps": 0.1, "bf16": False, "activation_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_length": None,
    }  # fmt: skip


def test_the_sft_loss_curve_equals_plain_trl(start, tiny_base, demonstrations, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ours = losses(run(sft.STAGE, start.root, model="start", data=demonstrations, name="ours-sft"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    records = load_records(str(demonstrations), view="demonstration").records
    rows = render_view("demonstration", records, tokenizer, 1024).rows
    columns = [
        {"input_ids": row["input_ids"], "completion_mask": list(map(int, row["completion_mask"]))} for row in rows
    ]

    trainer = SFTTrainer(
        model=plain_model(start, tiny_base),
        args=SFTConfig(**plain_arguments(tmp_path), completion_only_loss=True),
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
    )

    assert len(ours) == STEPS
    assert plain_losses(trainer) == ours


def test_the_dpo_loss_curve_equals_plain_trl_on_the_same_text(start, tiny_base, preferences, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = {"model": "start", "data": preferences, "name": "ours-dpo", "cache_reference": "false"}
    ours = losses(run(dpo.STAGE, start.root, **words))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    records = load_records(str(preferences), view="preference").records
    rows = render_view("preference", records, tokenizer, 1024).rows
    trainer = DPOTrainer(
        model=plain_model(start, tiny_base),
        args=DPOConfig(**plain_arguments(tmp_path), beta=0.1),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    trainer.train_dataset = Dataset.from_list(rows)

    assert plain_losses(trainer) == ours


def test_gradient_accumulation_gives_the_same_curve_as_a_larger_batch(start, demonstrations):
    whole = run(sft.STAGE, start.root, model="start", data=demonstrations, name="whole", max_steps=4)
    parts = run(
        sft.STAGE, start.root, model="start", data=demonstrations, name="parts", max_steps=4,
        per_device_train_batch_size=1, gradient_accumulation_steps=4,
    )  # fmt: skip

    assert losses(parts) == pytest.approx(losses(whole), abs=2e-5)
