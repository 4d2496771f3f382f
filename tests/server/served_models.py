"""A base and adapters over it, loud enough to tell apart, put into a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.models.adapters import digests_of_base, save_adapter
from align.registry import Registry


def commit_base(registry: Registry, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.model.norm.weight.data.mul_(20)  # fresh weights give nearly flat logits, under which all models sound alike
    with registry.stage("stone") as staging:
        model.save_pretrained(staging.path)
        tokenizer.save_pretrained(staging.path)
        return staging.commit({"stage": "pretrain", "kind": "base"})


def commit_adapter(registry: Registry, name: str, seed: int, **options: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    base = registry.resolve("stone")
    set_seed(seed)
    settings = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear", "init_lora_weights": False} | options
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.location), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with registry.stage(name) as staging:
        save_adapter(model, "default", staging.path, base.location)
        AutoTokenizer.from_pretrained(base.location).save_pretrained(staging.path)
        parent = {"reference": base.reference, "digest": base.digest}
        digests = {"reference": base.reference, "location": base.location, "digests": digests_of_base(base)}
        staging.commit({"stage": "sft", "kind": "policy", "parents": [parent], "base": digests})
