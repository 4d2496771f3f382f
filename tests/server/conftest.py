"""A registry with a base and two loud adapters, and the real engine over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_models import commit_adapter, commit_base

from align.engine.local import LocalEngine
from align.models.adapters import load_models
from align.models.loading import Precision
from align.registry import Registry, open_registry

SERVED = ("warm-sft", "cool-dpo@prod", "stone")


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
    engine = LocalEngine(load_models(models, list(SERVED), Precision()), max_rows=16, max_waiting_rows=60)
    yield engine
    engine.close()
