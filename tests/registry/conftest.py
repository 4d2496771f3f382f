from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import write_model

from align.registry import Checkpoint, Registry, open_registry

Commit = Callable[..., Checkpoint]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An empty registry; the working directory is empty too, so that no reference means a folder by accident."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("ALIGN_REGISTRY", raising=False)
    return open_registry(tmp_path / "registry")


@pytest.fixture
def commit() -> Commit:
    """Commit a small adapter (or a base) and return its checkpoint."""

    def write(registry: Registry, name: str, stage: str = "sft", kind: str = "policy", **fields: Any) -> Checkpoint:
        with registry.stage(name) as staging:
            write_model(staging.path, b"weights of " + name.encode(), kind)
            return staging.commit({"stage": stage, "kind": kind, **fields})

    return write
