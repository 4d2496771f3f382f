"""What is demanded of a model or an adapter that did not come from a registry: LoRA, safetensors, whole files.

Only names, JSON and the headers of safetensors files are read; a pickle is never opened.
"""

from __future__ import annotations

from pathlib import Path

from align.errors import IntegrityError, shorten
from align.registry import fingerprints
from align.registry.fingerprints import read_json

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""suffixes of files that may run code when they are opened"""

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_foreign(folder: Path, reference: str) -> None:
    """Raise IntegrityError when a folder from outside holds a model this program does not load.

    A folder without any weights passes: whoever needs them says so, and a tokenizer may be all that is wanted.
    """
    if (folder / "adapter_config.json").is_file():
        _check_adapter(folder, reference)
    else:
        _check_model(folder, reference)


def _check_adapter(folder: Path, reference: str) -> None:
    found = read_json(folder / "adapter_config.json").get("peft_type")
    if str(found).upper() != "LORA":
        raise IntegrityError(
            f"{reference}: an adapter of peft_type {shorten(found)}; only LORA can be used (DoRA and rsLoRA are"
            " such), train one with python -m align.sft"
        )
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise IntegrityError(
            f"{reference}: no {ADAPTER_WEIGHTS} in it{_pickles(folder)}; save the adapter again as safetensors"
        )
    fingerprints.check_whole(weights)


def _check_model(folder: Path, reference: str) -> None:
    weights = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if not weights and (pickles := _pickles(folder)):
        raise IntegrityError(
            f"{reference}: no safetensors weights in it{pickles}; convert the model with save_pretrained on a machine"
            " you can spare, or use a copy that has safetensors"
        )
    for path in weights:
        fingerprints.check_whole(path)


def _pickles(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    return f", only {', '.join(names[:3])}, and pickles are refused because opening one can run code" if names else ""
