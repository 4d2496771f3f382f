"""Models of a few bytes, written without any library."""

from __future__ import annotations

import json
from pathlib import Path


def safetensors(content: bytes) -> bytes:
    """A safetensors file of one tensor of bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    return len(header).to_bytes(8, "little") + header + content


def write_model(folder: Path, content: bytes, kind: str = "policy") -> Path:
    """Write a small adapter (or a base) into a folder."""
    weights, config = ("model", "config.json") if kind == "base" else ("adapter_model", "adapter_config.json")
    folder.mkdir(exist_ok=True)
    (folder / f"{weights}.safetensors").write_bytes(safetensors(content))
    (folder / config).write_text("{}" if kind == "base" else '{"peft_type": "LORA"}')
    return folder
