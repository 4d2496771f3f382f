"""The file an adapter is kept in: read with proof that it is whole, and that it fits its base and does something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError

if TYPE_CHECKING:
    from align.registry import Checkpoint

WEIGHTS = "adapter_model.safetensors"
_HEAD = ".score."


def read_adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tensors of a saved adapter without its score head, under their names in the file.

    Raises IntegrityError, with both digests when it is registered, unless the file is what was committed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(checkpoint.location) / WEIGHTS
    checkpoint.check(hashes=True)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path}: the adapter cannot be read ({error}); copy or train it again") from None
    return {key: tensor for key, tensor in state.items() if _HEAD not in key}


def load_state(model: Any, state: dict[str, Any], name: str, checkpoint: Checkpoint) -> None:
    """Give adapter `name` of a model the tensors of a saved one.

    Raises IntegrityError when a tensor is missing, too much or of another shape, and when the adapter does nothing.
    """
    from peft import set_peft_model_state_dict

    check_state(model, state, name, checkpoint)
    set_peft_model_state_dict(model, state, adapter_name=name)


def check_state(model: Any, state: dict[str, Any], name: str, checkpoint: Checkpoint) -> None:
    """What `load_state` raises, without loading; the model may be shapes without storage."""
    from peft import get_peft_model_state_dict

    fresh = get_peft_model_state_dict(model, adapter_name=name)
    expected = {key: tuple(tensor.shape) for key, tensor in fresh.items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise IntegrityError(
            f"{checkpoint.reference}: {len(wrong)} of {len(expected)} adapter tensors do not fit its base, first {key} "
            f"(expected {expected.get(key)}, found {found.get(key)}); the file is incomplete or of another model"
        )
    if not _is_live(state, fresh):
        raise IntegrityError(f"{checkpoint.reference}: every lora_B is zero, so it changes nothing; train it again")


def _is_live(state: dict[str, Any], fresh: dict[str, Any]) -> bool:
    """Whether an adapter does something: an update that is not zero, or (DoRA) magnitudes that are not the base's."""
    if any(bool(tensor.any()) for key, tensor in state.items() if "lora_B" in key):
        return True
    magnitudes = [key for key in state if "lora_magnitude_vector" in key]
    return any(
        fresh[key].is_meta or not state[key].float().allclose(fresh[key].float().cpu(), rtol=1e-4) for key in magnitudes
    )
