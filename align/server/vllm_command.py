"""The vLLM command that serves the same models.

Only files of the registry are read: neither torch nor vLLM has to be installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import IntegrityError, UsageError
from align.registry.references import LATEST
from align.server.served_models import ServedModels, public_name
from align.tuners import LORA, tuner_type

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""values of vLLM's --max-lora-rank"""


def vllm_command(
    registry: Registry, checkpoints: Sequence[Checkpoint], models: ServedModels, quantization: str = "none"
) -> list[str]:
    """Return the words of the command.

    Raises UsageError for models that vLLM cannot serve, IntegrityError when they do not share a base.
    """
    adapters = [checkpoint for checkpoint in checkpoints if checkpoint.is_adapter]
    bases = [registry.resolve_base(checkpoint) for checkpoint in checkpoints]
    base = bases[0]
    for checkpoint, other in zip(checkpoints, bases, strict=True):
        if other.location != base.location:
            about = f"another base than {base.reference}; serve models that share one base"
            raise IntegrityError(f"{checkpoint.reference}: {about}")
    if quantization == "int8":
        raise UsageError("--quantization int8: vLLM has nf4 only for such a base; give nf4 or none")
    words = ["vllm", "serve", base.location, *(["--revision", base.revision] if base.revision else [])]
    words += ["--served-model-name", *(_names(models, base) or [public_name(base.reference)])]
    words += ["--quantization", "bitsandbytes"] if quantization == "nf4" else []
    words += _tokenizer(checkpoints[0], base)
    if adapters:
        modules = [_module(name, adapter) for adapter in adapters for name in _names(models, adapter)]
        rank = max(map(_rank, adapters))
        words += ["--enable-lora", "--max-loras", str(len(modules)), "--max-lora-rank", str(rank)]
        words += ["--lora-modules", *modules]
    return words


def _names(models: ServedModels, checkpoint: Checkpoint) -> list[str]:
    """Return the ids of a model without `NAME@latest`, because each id takes memory in vLLM."""
    own = [name for name in models.names if models.find(name).reference == checkpoint.reference]
    return [name for name in own if not name.endswith(f"@{LATEST}")]


def _tokenizer(checkpoint: Checkpoint, base: Checkpoint) -> list[str]:
    """Return the options of tokenizer and template, where they are not the base's own."""
    from align.models.adapters import tokenizer_checkpoint
    from align.models.tokenizers import PLAIN_TEMPLATE

    home = Path(tokenizer_checkpoint(checkpoint, base).location)
    if not home.is_dir():
        return []  # a hub model brings both
    words = ["--tokenizer", str(home)] if home != Path(base.location) else []
    if (template := home / "chat_template.jinja").is_file():
        return [*words, "--chat-template", str(template)]
    config = home / "tokenizer_config.json"
    own = config.is_file() and json.loads(config.read_bytes()).get("chat_template")
    return words if own else [*words, "--chat-template", PLAIN_TEMPLATE]


def _module(name: str, adapter: Checkpoint) -> str:
    """Return an adapter as vLLM takes it: NAME=PATH, or JSON for a path with = or , in it."""
    if "=" in adapter.location or "," in adapter.location:
        return json.dumps({"name": name, "path": adapter.location})
    return f"{name}={adapter.location}"


def _rank(adapter: Checkpoint) -> int:
    from align.registry.checkpoint import adapter_config

    config = adapter_config(Path(adapter.location))
    traits = {
        f"its tuner is {tuner_type(config)}": tuner_type(config) != LORA,
        "it is DoRA": bool(config.get("use_dora")),
        "it trains whole modules beside its matrices": bool(config.get("modules_to_save")),
        "it trains biases": config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
        "it trains tokens one by one": bool(config.get("trainable_token_indices")),
        "it took a part out of its base when it started": config.get("init_lora_weights") in ("pissa", "olora"),
    }
    for trait, has_it in traits.items():
        if has_it:
            raise UsageError(
                f"{adapter.reference}: {trait}, which vLLM does not run over a shared base; merge it into a model "
                f"of its own: align registry merge {adapter.reference} --out DIR"
            )
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    fitting = [size for size in _RANKS if size >= rank]
    if not fitting:
        raise UsageError(f"{adapter.reference}: rank {rank}; vLLM takes {_RANKS[-1]} at most; merge it, or train less")
    return fitting[0]
