"""A base as its files announce it: config, names and shapes of tensors, and the errors of reading them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import AlignError, IntegrityError
from align.models.quiet_libraries import quiet_libraries
from align.registry import Checkpoint
from align.registry.fingerprints import read_json


def context_length(base: Checkpoint) -> int | None:
    """Return the number of positions a base holds, or None when its config does not say."""
    return _size(base, "max_position_embeddings", "n_positions")


def vocabulary_size(base: Checkpoint) -> int | None:
    """Return the number of tokens a base has embeddings for, or None when its config does not say."""
    return _size(base, "vocab_size")


def _size(base: Checkpoint, *names: str) -> int | None:
    """Return a size from a base's config; its file is read first, because importing transformers takes seconds."""
    written = read_json(Path(base.location) / "config.json")
    written = written.get("text_config", written)
    for name in names:
        if isinstance(written.get(name), int):
            return int(written[name])
    return getattr(load_text_config(base), names[0], None)


def load_text_config(base: Checkpoint) -> Any:
    """Return the part of a base's config that is about text."""
    with explain_load_errors(base):
        return load_config(base).get_text_config()


def load_config(base: Checkpoint) -> Any:
    """Return a base's config as transformers reads it."""
    quiet_libraries()
    with explain_load_errors(base):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(base.location, revision=base.revision, trust_remote_code=False)


def build_shapes(base: Checkpoint) -> Any:
    """Return a base as modules and shapes on torch's meta device: nothing is read but its config."""
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), explain_load_errors(base):
        return AutoModelForCausalLM.from_config(load_config(base))


def read_module_shapes(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return paths and shapes of the modules with a weight in a base's folder, from headers; none on the hub."""
    stored = read_tensor_shapes(base)
    return {key.removesuffix(".weight"): shape for key, shape in stored.items() if key.endswith(".weight")}


def read_tensor_shapes(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a base's folder; empty for one that is not on this machine."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(base.location).glob("*.safetensors")) if Path(base.location).is_dir() else []:
        try:
            with safe_open(path, "np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"{path}: weights cannot be read ({error}); copy or train the model again") from None
    return shapes


@contextmanager
def explain_load_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what the libraries raise about an unreadable model into an IntegrityError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        files = ", ".join(sorted(p.name for p in Path(checkpoint.location).glob("*.safetensors")))
        raise IntegrityError(
            f"{checkpoint.location}: weights cannot be read ({error}); found {files}; copy or train the model again"
        ) from None
    except (AlignError, MemoryError):
        raise
    except Exception as error:  # whatever a config that is not what it seems makes the libraries raise
        if type(error).__name__ == "OutOfMemoryError":
            raise
        remedy = "give a registry reference, a folder with config.json and *.safetensors, or a hub id"
        if not Path(checkpoint.location).is_dir():
            remedy = "check the name and the network (HF_HUB_OFFLINE=1 asks only for what was downloaded before)"
        first = next(filter(None, str(error).splitlines()), "")
        why = first if isinstance(error, OSError | ValueError) and first else f"{type(error).__name__}: {first}"
        if "trust_remote_code" in str(error):
            why = "it wants code of its own to be run, which is never done here"
        raise IntegrityError(f"{checkpoint.reference}: no model could be loaded ({why}); {remedy}") from error
