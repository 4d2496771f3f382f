"""Engines over a loaded base with two loud adapters, and one more with a DoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loud_models import build_loaded_base, loud_lora

from align.engine.local import LocalEngine
from align.models.adapters import LoadedBase


@pytest.fixture(scope="session")
def loaded(tiny_base: Path) -> LoadedBase:
    return build_loaded_base(tiny_base)


@pytest.fixture(scope="session")
def engine(loaded: LoadedBase) -> Iterator[LocalEngine]:
    engine = LocalEngine(loaded, prefill_chunk_tokens=32)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def mixed_engine(tiny_base: Path) -> Iterator[LocalEngine]:
    """An engine of its own for tests that break or close things, with a DoRA adapter among the models."""
    loaded = build_loaded_base(tiny_base)
    loaded.model.add_adapter("adapter2", loud_lora(3, use_dora=True))
    loaded.model.eval()
    loaded.adapters["dora@v1"] = "adapter2"
    engine = LocalEngine(loaded)
    yield engine
    engine.close()
