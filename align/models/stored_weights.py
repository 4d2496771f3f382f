"""Proof that a base's files hold the model its config announces: sizes before loading, names and numbers after it."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from align.errors import IntegrityError
from align.models.base_files import build_shapes, load_text_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from align.registry import Checkpoint

_NEW_HEAD = {"score.weight"}
_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.inv_freq$|(^|\.)position_ids$")
"""buffers that older programs wrote beside the weights; they are computed anew"""

_MOST_EMPTY = 8
_ALWAYS_ALLOWED = 10_000_000
"""a config may announce so many times the stored numbers, or so many numbers, before it is taken for a mistake"""

_NAMED = 4


def check_announced(base: Checkpoint, stored: dict[str, tuple[int, ...]]) -> None:
    """Raise IntegrityError when a config announces a model far larger than `stored`, the shapes in its files.

    Such a model would be built, and filled with random numbers, before anybody could say what is missing.
    """
    layers = getattr(load_text_config(base), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(stored):
        raise IntegrityError(
            f"{base.reference}: its config announces {layers} layers, its weights are {len(stored)} tensors; "
            "restore config.json or the weights"
        )
    announced = sum(parameter.numel() for parameter in build_shapes(base).parameters())
    in_files = sum(_size(shape) for shape in stored.values())
    if announced > max(_MOST_EMPTY * in_files, _ALWAYS_ALLOWED + in_files):
        raise IntegrityError(
            f"{base.reference}: its config announces {announced:,} numbers, its weights hold {in_files:,}; restore "
            "config.json or the weights"
        )


def check_loaded(base: Checkpoint, model: Any, report: dict[str, Any], *, new_head: bool) -> None:
    """Raise IntegrityError unless every weight of a model came from its files; `report` is transformers' own.

    With `new_head` the score head may be new and the language head left over. Tensors for which the model has no
    place at all (a vision tower, a value head) are told in a line; those that its layers should have had are refused.
    """
    missing = set(report["missing_keys"]) - (_NEW_HEAD if new_head else set())
    misshapen = {
        str(key): f"{key} (stored {_shape(a)}, expected {_shape(b)})" for key, a, b in report["mismatched_keys"]
    }
    unexpected = {key for key in report["unexpected_keys"] if not _MASKS.search(key)}
    if new_head:
        unexpected = {key for key in unexpected if not key.startswith(("lm_head.", "embed_out."))}
    foreign = {key for key in unexpected if not _belongs(model, key)}
    if problems := [
        *_listed("missing", missing - misshapen.keys()),
        *_listed("of another shape", misshapen.values()),
        *_listed("unexpected", unexpected if missing or misshapen else unexpected - foreign),
        *_listed("not readable", report.get("error_msgs") or ()),
    ]:
        raise IntegrityError(
            f"{base.reference}: its weights are not the model its config announces: {'; '.join(problems)}; they would "
            "be random or left out; convert or download the model again"
        )
    if foreign:
        named = "; ".join(_listed("unused", foreign))
        sys.stderr.write(f"{base.reference}: the model has no place for some of its tensors ({named})\n")


def check_finite(base: Checkpoint, model: Any) -> None:
    """Raise IntegrityError when a weight of a model is not a finite number; rounded ones tell by their scale."""
    import torch

    broken = [key for key, value in model.named_parameters() if not _is_finite(torch, value)]
    if broken:
        raise IntegrityError(
            f"{base.reference}: {'; '.join(_listed('not finite (NaN or infinite)', broken))}; convert or download the "
            "model again"
        )


def _is_finite(torch: Any, value: Any) -> bool:
    state = getattr(value, "quant_state", None)
    if state is not None:
        # The absolute maxima of the blocks, which may be rounded too; their mean is not.
        offset = getattr(state, "offset", None)
        value = offset if offset is not None else state.absmax
    elif getattr(value, "SCB", None) is not None:
        value = value.SCB
    if value.is_meta or not value.is_floating_point() or not value.numel():
        return True
    # Neither makes a copy; one that is not a number spreads to both.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value.detach()))


def _belongs(model: Any, key: str) -> bool:
    """Return whether a tensor belongs to a layer of the model: its module is there, or the list of layers."""
    names = key.split(".")[:-1]
    module, depth, in_layers = model, 0, False
    for name in names:
        child = getattr(module, "_modules", {}).get(name)
        in_layers = in_layers or type(module).__name__ == "ModuleList"
        if child is None:
            break
        module, depth = child, depth + 1
    return depth == len(names) or in_layers or type(module).__name__ == "ModuleList"


def _listed(what: str, names: Iterable[str]) -> list[str]:
    """Return a part of a message: the number of tensors, what is wrong with them and the first names; or none."""
    listed = sorted(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return [f"{len(listed)} {what}: {', '.join(listed[:_NAMED])}{more}"] if listed else []


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "one number"


def _size(shape: Iterable[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product
