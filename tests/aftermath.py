"""What a run leaves behind in a registry."""

from __future__ import annotations

import json
from pathlib import Path

CLOCKS = ("tokens_per_second", "_runtime", "_per_second")


def run_folder(root: Path) -> Path:
    """The folder of the newest run in a registry."""
    return sorted(path.parent for path in root.glob("runs/*/*/run.json"))[-1]


def log_of(root: Path) -> list[dict[str, float]]:
    """The log of the newest run, without what a clock has measured."""
    lines = (run_folder(root) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith(CLOCKS)} for line in lines]


def weights_of(root: Path) -> dict[str, bytes]:
    """The bytes of the only registered version's weights."""
    (folder,) = root.glob("models/*/v*")
    assert folder.name == "v0001"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def versions(root: Path) -> list[str]:
    """The registered versions, as NAME/vNNNN."""
    return sorted(f"{path.parent.name}/{path.name}" for path in root.glob("models/*/v*"))


def checkpoints(root: Path) -> list[str]:
    """The checkpoints of the newest run, whole or torn, by step."""
    return sorted((path.name for path in run_folder(root).glob("checkpoint-*")), key=lambda name: (len(name), name))
