"""The models a server offers, their ids and their provenance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UsageError, nearest
from align.registry.lineage import parent_links
from align.registry.references import LATEST
from align.server.api_errors import ApiError

if TYPE_CHECKING:
    from align.registry import Checkpoint, Registry


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
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "align",
            "root": self.name,
            "parent": self.parent,
            "base": self.base,
            "digest": self.digest,
        }


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
            reference=checkpoint.reference,
            names=_names(registry, checkpoint, versions.count(checkpoint.name) == 1),
            base=public_name(registry.resolve_base(checkpoint).reference),
            parent=public_name(parents[0]["reference"]) if parents else None,
            digest=checkpoint.digest,
            created=int(datetime.fromisoformat(created).timestamp()) if created else 0,
        )
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
