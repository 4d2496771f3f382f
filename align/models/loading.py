"""Loading a base once, in the precision asked for, with proof that its files hold the model its config announces.

Nothing else in the program reads model weights.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from align.config import StageConfig
from align.errors import IntegrityError, MachineError, UsageError
from align.models.base_files import build_shapes, explain_load_errors, load_text_config, read_tensor_shapes
from align.models.quiet_libraries import quiet_libraries
from align.registry import Checkpoint

HeadKind = Literal["causal", "score"]

_CHATTY = ("modeling_utils", "utils.loading_report", "distributed.tensor_parallel")
"""loggers of transformers"""

_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.inv_freq$|(^|\.)position_ids$")
"""buffers that older programs wrote beside the weights; they are computed anew"""

_MOST_EMPTY = 8
_ALWAYS_ALLOWED = 10_000_000
"""a config may announce so many times the stored numbers, or so many numbers, before it is taken for a mistake"""

_NAMED = 4

_ROUNDED_PRODUCT = "qlinear_pointwise"


@dataclass(frozen=True)
class Precision:
    """Types of a frozen base's weights; `bf16` None lets the device decide."""

    quantization: Literal["none", "nf4", "int8", "int4"] = "none"
    """int4 is only for models that generate, on a CPU"""
    bf16: bool | None = None

    @classmethod
    def of(cls, config: StageConfig) -> Precision:
        """Return the precision a stage's configuration asks for."""
        return cls(config.quantization, config.bf16)

    @property
    def uses_bf16(self) -> bool:
        """Return whether arithmetic is bfloat16: as asked, else where the accelerator supports it."""
        if self.bf16 is not None:
            return self.bf16
        import torch

        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)

    @property
    def rounds_layers(self) -> bool:
        """Return whether a model that only generates gets layers of `rounded_linear`: int8 or int4 on such a CPU."""
        import torch

        known = torch.cpu._is_vnni_supported() and hasattr(torch.ops.onednn, _ROUNDED_PRODUCT)
        return known and current_device() == "cpu" and self.quantization in {"int8", "int4"}

    def check(self) -> None:
        """Raise MachineError or UsageError when this machine cannot hold a base so."""
        if self.quantization == "int4":
            raise UsageError(
                "quantization=int4: is for models that only generate, on a CPU with AVX512-VNNI, found "
                f"{current_device()}; give nf4 or int8"
            )
        if self.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
            why = f"quantization={self.quantization}: bitsandbytes is not installed"
            raise MachineError(f"{why}; pip install 'align[qlora]'")
        if self.bf16:
            import torch

            if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UsageError(
                    f"bf16=true: {torch.cuda.get_device_name()} has no bfloat16 arithmetic; set bf16=false, or use a "
                    "GPU of the Ampere generation or a later one"
                )

    def refuse_full_training(self) -> None:
        """Raise UsageError when weights held so cannot all be trained."""
        if self.quantization != "none":
            raise UsageError(
                f"lora=none with quantization={self.quantization}: rounded weights cannot be trained; "
                "give quantization=none, or train an adapter"
            )


def load_base(
    checkpoint: Checkpoint, precision: Precision, head: HeadKind = "causal", *, device: str | None = None
) -> Any:
    """Load the weights of a base, frozen; with `head="score"` the language head is replaced by one scalar score.

    Raises IntegrityError for weights not readable, missing, misshapen or not finite, and what `Precision.check` does.
    """
    precision.check()
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    if stored := read_tensor_shapes(checkpoint):
        _check_announced(checkpoint, stored)
    with quiet_load_report(), explain_load_errors(checkpoint):
        # Misshapen tensors are named by `_check_loaded`; transformers would only say that there are some.
        model, report = loader.from_pretrained(
            checkpoint.location, revision=checkpoint.revision, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
            **_weight_options(precision), **({"num_labels": 1} if head == "score" else {}),
        )  # fmt: skip
    _check_loaded(checkpoint, model, report, new_head=head == "score" and "score.weight" not in stored)
    _check_finite(checkpoint, model)
    _keep_trainable_after_eval(model)
    model.requires_grad_(False)
    if precision.quantization == "none":
        return model.to(device or current_device())
    # Weights that were not rounded are copied: one that is still the file's own memory keeps the whole file in it.
    for parameter in filter(torch.is_floating_point, model.parameters()):
        parameter.data = parameter.data.clone()
    return model


def _weight_options(precision: Precision) -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if precision.uses_bf16 else torch.float32
    if precision.quantization == "none":
        return {"dtype": dtype}
    if precision.quantization == "int8":
        rounding = BitsAndBytesConfig(load_in_8bit=True)
    else:
        rounding = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return {"dtype": dtype, "quantization_config": rounding, "device_map": {"": current_device()}}


def _keep_trainable_after_eval(model: Any) -> None:
    # bitsandbytes 0.50 repacks 4-bit layers for CPU inference on the first evaluation forward and never unpacks: from
    # then on adapters get no gradient.
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Hide transformers' table of missing keys: `_check_loaded` reads the same report and refuses."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    levels = {logger: logger.level for logger in (logging.getLogger(f"transformers.{name}") for name in _CHATTY)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _check_announced(base: Checkpoint, stored: dict[str, tuple[int, ...]]) -> None:
    # A model far larger than its files would be built, and filled with random numbers, before anybody could say so.
    layers = getattr(load_text_config(base), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(stored):
        raise IntegrityError(
            f"{base.reference}: its config announces {layers} layers, its weights are {len(stored)} tensors; "
            "restore config.json or the weights"
        )
    announced = sum(parameter.numel() for parameter in build_shapes(base).parameters())
    in_files = sum(map(prod, stored.values()))
    if announced > max(_MOST_EMPTY * in_files, _ALWAYS_ALLOWED + in_files):
        raise IntegrityError(
            f"{base.reference}: its config announces {announced:,} numbers, its weights hold {in_files:,}; restore "
            "config.json or the weights"
        )


def _check_loaded(base: Checkpoint, model: Any, report: dict[str, Any], *, new_head: bool) -> None:
    """Raise IntegrityError unless every weight of a model came from its files; `report` is transformers' own.

    Tensors that a model has no place for (a vision tower, a value head) are told; those that its layers lack, refused.
    """
    missing = set(report["missing_keys"]) - ({"score.weight"} if new_head else set())
    shapes = ((str(key), _shape(a), _shape(b)) for key, a, b in report["mismatched_keys"])
    misshapen = {key: f"{key} (stored {stored}, expected {expected})" for key, stored, expected in shapes}
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


def _check_finite(base: Checkpoint, model: Any) -> None:
    """Raise IntegrityError when a weight of a model is not a finite number; rounded ones tell by their scale."""
    import torch

    broken = []
    for key, value in model.named_parameters():
        if (state := getattr(value, "quant_state", None)) is not None:
            # The absolute maxima of the blocks, which may be rounded too; their mean is not.
            offset = getattr(state, "offset", None)
            value = offset if offset is not None else state.absmax
        elif (scale := getattr(value, "SCB", None)) is not None:
            value = scale
        if value.is_meta or not value.is_floating_point() or not value.numel():
            continue
        # Neither end makes a copy; a number that is not finite spreads to both.
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(value.detach())):
            broken.append(key)
    if broken:
        raise IntegrityError(
            f"{base.reference}: {'; '.join(_listed('not finite (NaN or infinite)', broken))}; convert or download the "
            "model again"
        )


def _belongs(model: Any, key: str) -> bool:
    """Return whether a tensor belongs to a layer of the model: its module is there, or the list of layers."""
    module = model
    for name in key.split(".")[:-1]:
        if type(module).__name__ == "ModuleList":
            return True
        if (module := module._modules.get(name)) is None:
            return False
    return True


def _listed(what: str, names: Iterable[str]) -> list[str]:
    """Return a part of a message: the number of tensors, what is wrong with them, the first names; none if empty."""
    listed = sorted(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return [f"{len(listed)} {what}: {', '.join(listed[:_NAMED])}{more}"] if listed else []


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "one number"


def current_device() -> str:
    """Return the device of a base: the accelerator of this process, else the CPU."""
    import torch

    # Of several processes each has set a device of its own.
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def save_base(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write a full model, or its gathered weights, and its tokenizer as plain safetensors into `folder`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def checkpoint_activations(model: Any) -> None:
    """Let a model compute its activations again in the backward pass instead of keeping them."""
    with warnings.catch_warnings():
        # The name that works from transformers 5.5 on; 5.23 has a newer one beside it.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})


def switch_off_dropout(model: Any) -> None:
    """Make training and evaluation the same function.

    Dropout modules are not all: OPT calls the function with a rate it keeps as a number, attention modules do so too,
    and a layer can be dropped whole. TRL 1.16's `disable_dropout` only knows the modules.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
