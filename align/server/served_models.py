"""The models a server offers, their ids and their provenance, and the vLLM command that serves the same models.

Only files of the registry are read for that command: neither torch nor vLLM has to be installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError, UsageError, nearest
from align.registry.lineage import parent_links
from align.registry.references import LATEST
from align.server.api_errors import ApiError
from align.tuners import LORA, tuner_type

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""values of vLLM's --max-lora-rank"""


@dataclass(frozen=True)
class ServedModel:
    """One model of the engine, with its ids."""

    reference: str
    """its name in the engine"""
    names: tuple[str, ...]
    """its ids: the registry reference first, then aliases; never a path"""
    base: str
    parent: str | None = None
    """the reference it was trained from"""
    digest: str | None = None
    """of its manifest, which covers all its files"""
    created: int = 0
    """seconds since 1970"""

    @property
    def name(self) -> str:
        """The id that is not an alias."""
        return self.names[0]

    def card(self, name: str) -> dict[str, Any]:
        """Return the entry of /v1/models under one of its ids."""
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "align",
            "root": self.name, "parent": self.parent, "base": self.base, "digest": self.digest,
        }  # fmt: skip


class ServedModels:
    """The models by id; aliases are resolved once, when the server starts."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._by_name: dict[str, ServedModel] = {}
        for served in models:
            for name in served.names:
                other = self._by_name.setdefault(name, served)
                if other is not served:
                    both = f"{served.reference} and {other.reference}"
                    raise UsageError(f"{name}: {both} would both be called this; serve one of them")

    @property
    def names(self) -> list[str]:
        """Every id."""
        return list(self._by_name)

    @property
    def references(self) -> list[str]:
        """Their names in the engine."""
        return list(dict.fromkeys(served.reference for served in self._by_name.values()))

    def find(self, name: str) -> ServedModel:
        """Return the model of an id; raises ApiError (404) when there is none."""
        if name not in self._by_name:
            message = f"model {name!r}: not served here;{nearest(name, self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._by_name[name]

    def cards(self) -> list[dict[str, Any]]:
        """Return the entries of /v1/models, one an id."""
        return [served.card(name) for name, served in self._by_name.items()]


def find_models(registry: Registry, references: Iterable[str]) -> list[Checkpoint]:
    """Resolve references; raises UsageError when two are the same model."""
    resolved: dict[str, tuple[str, Checkpoint]] = {}
    for reference in references:
        checkpoint = registry.resolve(reference)
        if other := resolved.get(checkpoint.reference):
            raise UsageError(f"{reference}: the same model as {other[0]} ({checkpoint.reference}); leave one out")
        resolved[checkpoint.reference] = (reference, checkpoint)
    return [checkpoint for _, checkpoint in resolved.values()]


def describe_models(registry: Registry, checkpoints: Sequence[Checkpoint]) -> ServedModels:
    """Return these checkpoints as models with ids.

    A bare registered name is an id too where only one of its versions is served, and the hub id of a hub model.
    """
    versions = [checkpoint.name for checkpoint in checkpoints]
    models = []
    for checkpoint in checkpoints:
        parents = parent_links(checkpoint)
        created = (checkpoint.manifest or {}).get("created")
        model = ServedModel(
            checkpoint.reference, _names(registry, checkpoint, versions.count(checkpoint.name) == 1),
            base=public_name(registry.resolve_base(checkpoint).reference), digest=checkpoint.digest,
            parent=public_name(parents[0]["reference"]) if parents else None,
            created=int(datetime.fromisoformat(created).timestamp()) if created else 0,
        )  # fmt: skip
        models.append(model)
    return ServedModels(models)


def public_name(reference: str) -> str:
    """Return a reference without the folders above it, which clients must not see."""
    return Path(reference).name if Path(reference).is_absolute() else reference


def _names(registry: Registry, checkpoint: Checkpoint, only_version: bool) -> tuple[str, ...]:
    if checkpoint.name is None or Path(checkpoint.reference).is_absolute():
        names = [public_name(checkpoint.reference), checkpoint.reference.removeprefix("hf://")]
        return tuple(dict.fromkeys(name for name in names if not Path(name).is_absolute()))
    aliases = registry.aliases(checkpoint.name)
    names = [f"{checkpoint.name}@{alias}" for alias, version in aliases.items() if version == checkpoint.version]
    if registry.versions(checkpoint.name)[-1].version == checkpoint.version:
        names.append(f"{checkpoint.name}@{LATEST}")
    return (checkpoint.reference, *names, *([checkpoint.name] if only_version else []))


def vllm_command(
    registry: Registry, checkpoints: Sequence[Checkpoint], models: ServedModels, quantization: str = "none"
) -> list[str]:
    """Return the command's words; raises UsageError for models vLLM cannot serve, IntegrityError for several bases."""
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
    words += ["--served-model-name", *(_served_names(models, base) or [public_name(base.reference)])]
    words += ["--quantization", "bitsandbytes"] if quantization == "nf4" else []
    words += _tokenizer(checkpoints[0], base)
    if adapters:
        modules = [_module(name, adapter) for adapter in adapters for name in _served_names(models, adapter)]
        rank = max(map(_rank, adapters))
        words += ["--enable-lora", "--max-loras", str(len(modules)), "--max-lora-rank", str(rank)]
        words += ["--lora-modules", *modules]
    return words


def _served_names(models: ServedModels, checkpoint: Checkpoint) -> list[str]:
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
