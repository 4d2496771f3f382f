"""Counting parameters on a model without storage, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError
from align.models.adapter_config import explain_settings, insert_adapter, new_config, saved_config, set_trainable
from align.models.adapter_kinds import read_adapter_settings
from align.models.loading import explain_load_errors
from align.models.lora_starts import plain_start
from align.models.quiet_libraries import quiet_libraries
from align.tuners import find_obstacle, tuner_type

if TYPE_CHECKING:
    from align.config import StageConfig
    from align.registry import Checkpoint


_POSITIONS = ("max_position_embeddings", "n_positions")


def context_length(base: Checkpoint) -> int | None:
    """Return the number of positions a base holds, or None when its config does not say."""
    return _size(base, *_POSITIONS)


def vocabulary_size(base: Checkpoint) -> int | None:
    """Return the number of tokens a base has embeddings for, or None when its config does not say."""
    return _size(base, "vocab_size")


def _size(base: Checkpoint, *names: str) -> int | None:
    """Return a size from a base's config; its file is read first, because importing transformers takes seconds."""
    from align.registry.fingerprints import read_json

    written = read_json(Path(base.location) / "config.json")
    written = written.get("text_config", written)
    for name in names:
        if isinstance(written.get(name), int):
            return int(written[name])
    return getattr(load_text_config(base), names[0], None)


def load_text_config(base: Checkpoint) -> Any:
    """Return the part of a base's config that is about text."""
    quiet_libraries()
    with explain_load_errors(base):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            base.location, revision=base.revision, trust_remote_code=False
        ).get_text_config()


def read_module_shapes(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the paths of the modules with a weight in a base's folder, and its shape; only headers are read.

    Empty for a base that is not on this machine.
    """
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


def count_trainable(parent: Checkpoint, base: Checkpoint, config: StageConfig) -> tuple[int, int]:
    """Trainable and total parameters of a run from `parent`: its own adapter's, a new LoRA's, or all."""
    parameters = list(build_trained_shapes(build_shapes(base), parent, config).parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters)


def build_trained_shapes(model: Any, parent: Checkpoint, config: StageConfig) -> Any:
    """Return the shapes of a base with what a run from `parent` adds to it: its own adapter, a new one, or both.

    Tuners that are built from the base's values are left out: there are none yet.
    """
    import torch

    if config.new_adapter is None:
        return model
    with torch.device("meta"):
        if config.fresh_adapter or not parent.is_adapter:
            adapter = new_config(model, config.new_adapter)
            if is_countable(adapter.peft_type.value):
                with explain_settings(config.new_adapter):
                    model = insert_adapter(model, plain_start(adapter), "default")
        if parent.is_adapter and is_countable(tuner_type(read_adapter_settings(parent))):
            name = "frozen" if config.fresh_adapter else "default"
            model = insert_adapter(model, saved_config(model, parent, trainable=not config.fresh_adapter), name)
            set_trainable(model, name, not config.fresh_adapter)
    return model


def is_countable(tuner: str) -> bool:
    """Return whether PEFT can set an adapter of this tuner on shapes without values."""
    return find_obstacle(tuner, "count") is None


def build_shapes(base: Checkpoint) -> Any:
    """Return a base as modules and shapes on torch's meta device: nothing is read but its config."""
    quiet_libraries()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), explain_load_errors(base):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base.location, revision=base.revision, trust_remote_code=False)
        )
