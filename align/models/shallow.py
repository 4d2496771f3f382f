"""A base of the same widths with fewer layers and random weights, and adapters cut to it: steps on it are timed.

Nothing is read of the base but its config and tokenizer.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from align.models.adapter_files import WEIGHTS
from align.models.base_files import explain_load_errors, load_config
from align.models.tokenizers import load_tokenizer
from align.registry import Checkpoint

_LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
)


def count_layers(base: Checkpoint) -> int:
    """Return the number of layers of a base."""
    return int(load_config(base).get_text_config().num_hidden_layers)


def write_shallow_base(base: Checkpoint, layers: int, folder: Path) -> None:
    """Write a base with so many layers, the widths, head and tokenizer of another and random weights, as a model."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    with explain_load_errors(base):
        config = _cut(load_config(base), layers)
        with torch.random.fork_rng():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    disable_progress_bar()
    model.save_pretrained(folder)
    if not _copy_tokenizer(Path(base.location), folder):
        load_tokenizer(base).save_pretrained(folder)


def _copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy the files of a tokenizer; False where there are none, as for a base of the hub."""
    paths = [path for pattern in _TOKENIZER for path in source.glob(pattern)]
    for path in paths:
        shutil.copy(path, folder)
    return bool(paths)


def write_shallow_adapter(adapter: Checkpoint, layers: int, base: Path, folder: Path) -> None:
    """Write what a saved adapter has on the first layers, score head included, as an adapter over a shallow base."""
    from safetensors.torch import load_file, save_file

    source = Path(adapter.location)
    folder.mkdir()
    _copy_tokenizer(source, folder)
    settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    state = load_file(source / WEIGHTS)
    save_file({key: value for key, value in state.items() if _is_below(key, layers)}, folder / WEIGHTS)


def _is_below(key: str, layers: int) -> bool:
    found = _LAYER.search(key)
    return found is None or int(found[1]) < layers


def _cut(config: Any, layers: int) -> Any:
    """Return a config with the first layers only; lists with an entry a layer are cut as well."""
    text = config.get_text_config()
    all_layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == all_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config
