"""Checks of a model or an adapter that did not come from a registry: known tuner, safetensors, whole files.

Only names, JSON and the headers of safetensors files are read; a pickle is never opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import IntegrityError, shorten
from align.registry import fingerprints
from align.registry.fingerprints import read_json
from align.tuners import find_obstacle, tuner_type

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""suffixes of files that may run code when they are opened"""

_OPENED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".safetensors"}
"""suffixes of the files that the libraries open in a model's folder"""

_MAX_TEXT_BYTES, _MAX_VOCABULARY_BYTES = 16 << 20, 256 << 20
_VOCABULARY_NAMES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "model.safetensors.index.json"}
"""names of texts that may hold a vocabulary"""

_BUILT_IN_IMPLEMENTATIONS = {
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "grouped_mm", "batched_mm"
}  # fmt: skip
"""implementations that come with torch or are packages of this machine; any other name is a repository of the hub"""

_MAX_DEPTH = 4

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_untrusted(folder: Path, reference: str) -> None:
    """Raise IntegrityError when a folder from outside holds a model this program does not load.

    A folder without any weights passes: their user reports that, and a tokenizer may be all that is wanted.
    """
    _check_files(folder, reference)
    if (folder / "adapter_config.json").is_file():
        _check_adapter(folder, reference)
        return
    weights = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if not weights and (pickles := _pickles(folder)):
        raise IntegrityError(
            f"{reference}: no safetensors weights in it{pickles}; convert the model with save_pretrained on a machine"
            " you can spare, or use a copy that has safetensors"
        )
    for path in weights:
        fingerprints.check_safetensors(path)


def _check_files(folder: Path, reference: str) -> None:
    """Raise IntegrityError for a pipe, a device or a text of absurd size where the libraries would read a file."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in _OPENED_SUFFIXES or not path.exists():
            continue
        if not path.is_file():
            raise IntegrityError(f"{reference}: {path.name} is no regular file; copy the model again")
        limit = _MAX_VOCABULARY_BYTES if path.name in _VOCABULARY_NAMES else _MAX_TEXT_BYTES
        if path.suffix not in (".safetensors", ".model") and (size := path.stat().st_size) > limit:
            raise IntegrityError(
                f"{reference}: {path.name} has {size:,} bytes, {limit:,} at most are read; copy the model again"
            )
    for key, value in _implementations(read_json(folder / "config.json")):
        if value not in _BUILT_IN_IMPLEMENTATIONS:
            raise IntegrityError(
                f"{reference}: its config.json asks for {key} {shorten(value)}, which is fetched and run; code of "
                "others is never run here, take that line out"
            )


def _implementations(config: dict[str, Any], depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the settings of a config, nested ones too, that name the code of attention or experts."""
    for key, value in config.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            yield from _implementations(value, depth + 1)
        elif ("attn_implementation" in key or "experts_implementation" in key) and isinstance(value, str):
            yield key, value


def _check_adapter(folder: Path, reference: str) -> None:
    config = read_json(folder / "adapter_config.json")
    if reason := find_obstacle(tuner_type(config), "train"):
        raise IntegrityError(
            f"{reference}: an adapter of peft_type {shorten(config.get('peft_type'))}, which cannot be used: {reason}; "
            "train one with align sft"
        )
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise IntegrityError(
            f"{reference}: no {ADAPTER_WEIGHTS} in it{_pickles(folder)}; save the adapter again as safetensors"
        )
    fingerprints.check_safetensors(weights)


def _pickles(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    return f", only {', '.join(names[:3])}, and pickles are refused because opening one can run code" if names else ""
