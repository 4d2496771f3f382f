"""A loaded base with two adapters that differ loudly enough for texts to differ within a few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.engine.local import LocalEngine
from align.models.adapters import BASE, LoadedBase
from align.registry.checkpoint import read_folder

_LAST_NORMS = ("norm", "embedding_norm", "norm_f", "final_layernorm", "ln_f", "final_layer_norm")


def loud_lora(seed: int, **options: Any) -> Any:
    from peft import LoraConfig
    from transformers import set_seed

    set_seed(seed)
    return LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, **options)


def loud_base(folder: Path) -> Any:
    """Fresh weights give nearly flat logits, under which every model samples what the seed says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _LAST_NORMS]
    norms[-1].weight.data.mul_(20)
    return model


def build_loaded_base(folder: Path) -> LoadedBase:
    from peft import get_peft_model
    from transformers import AutoTokenizer

    model = get_peft_model(loud_base(folder), loud_lora(1), adapter_name="adapter0")
    model.add_adapter("adapter1", loud_lora(2))
    names = {"red@v1": "adapter0", "blue@v1": "adapter1", "base@v1": BASE}
    return LoadedBase(model.eval(), AutoTokenizer.from_pretrained(folder), read_folder(folder), names)


def bare_engine(folder: Path, **options: Any) -> LocalEngine:
    """An engine over a base alone, `base@v1`."""
    from align.models.tokenizers import load_tokenizer

    base = read_folder(folder)
    return LocalEngine(LoadedBase(loud_base(folder).eval(), load_tokenizer(base), base, {"base@v1": BASE}), **options)


def save_adapters(base: Path, folder: Path) -> list[str]:
    """The two adapters in folders of their own, as PEFT writes them."""
    model = build_loaded_base(base).model
    for name in ("adapter0", "adapter1"):
        model.peft_config[name].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return [str(folder / "adapter0"), str(folder / "adapter1")]
