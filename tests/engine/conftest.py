"""Engines over a resident base with two loud adapters, and one more with a DoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loud_models import build_resident, loud_lora

from align.engine.local import LocalEngine
from align.models.adapters import Resident


@pytest.fixture(scope="session")
def resident(tiny_base: Path) -> Resident:
    return build_resident(tiny_base)


@pytest.fixture(scope="session")
def engine(resident: Resident) -> Iterator[LocalEngine]:
    engine = LocalEngine(resident, max_read=32)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def mixed_engine(tiny_base: Path) -> Iterator[LocalEngine]:
    """An engine of its own for tests that break or close things, with a DoRA adapter among the models."""
    resident = build_resident(tiny_base)
    resident.model.add_adapter("adapter2", loud_lora(3, use_dora=True))
    resident.model.eval()
    resident.adapters["dora@v1"] = "adapter2"
    engine = LocalEngine(resident)
    yield engine
    engine.close()
