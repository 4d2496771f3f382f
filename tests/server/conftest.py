"""A registry with a base and two loud adapters, and the real engine over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.engine.local import LocalEngine
from align.models.adapters import digests_of_base, load_resident, save_adapter
from align.models.loading import Precision
from align.registry import Registry, open_registry

SERVED = ("warm-sft", "cool-dpo@prod", "stone")


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


@pytest.fixture(scope="session")
def models(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """`stone`, and over it `warm-sft` (two versions) and `cool-dpo`, whose first version is `prod`."""
    registry = open_registry(tmp_path_factory.mktemp("models") / "registry")
    commit_base(registry, tiny_base)
    commit_adapter(registry, "warm-sft", 1)
    commit_adapter(registry, "warm-sft", 2)
    commit_adapter(registry, "cool-dpo", 3)
    registry.set_alias("cool-dpo", "prod", 1)
    return registry


@pytest.fixture(scope="session")
def engine(models: Registry) -> Iterator[LocalEngine]:
    engine = LocalEngine(load_resident(models, list(SERVED), Precision()), max_rows=16)
    yield engine
    engine.close()
