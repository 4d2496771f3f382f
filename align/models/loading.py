"""Loading a base model once, in the precision asked for; nothing else in the program reads model weights."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.errors import MachineError, UsageError
from align.models.base_files import explain_load_errors, read_tensor_shapes
from align.models.quiet_libraries import quiet_libraries
from align.models.stored_weights import check_announced, check_finite, check_loaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from align.config import StageConfig
    from align.registry import Checkpoint

HeadKind = Literal["causal", "score"]

_CHATTY = (
    "transformers.modeling_utils",
    "transformers.utils.loading_report",
    "transformers.distributed.tensor_parallel",
)


@dataclass(frozen=True)
class Precision:
    """Types of a frozen base's weights: `quantization` none, nf4 or int8; `bf16` None lets the device decide."""

    quantization: Literal["none", "nf4", "int8"] = "none"
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

    def check(self) -> None:
        """Raise MachineError or UsageError when this machine cannot hold a base so."""
        if self.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
            raise MachineError(
                f"quantization={self.quantization}: bitsandbytes is not installed; pip install 'align[qlora]'"
            )
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

    Raises IntegrityError when the folder holds no readable safetensors model, when a weight is missing, misshapen or
    not finite, and what `Precision.check` raises.
    """
    precision.check()
    quiet_libraries()
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    options = _weight_options(precision)
    if head == "score":
        options["num_labels"] = 1
    if stored := read_tensor_shapes(checkpoint):
        check_announced(checkpoint, stored)
    with _quiet_load_report(), explain_load_errors(checkpoint):
        # Misshapen tensors are named by `check_loaded`; transformers would only say that there are some.
        model, report = loader.from_pretrained(
            checkpoint.location,
            revision=checkpoint.revision,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    check_loaded(checkpoint, model, report, new_head=head == "score" and "score.weight" not in stored)
    check_finite(checkpoint, model)
    _keep_trainable_after_eval(model)
    if precision.quantization != "none":
        _let_go_of_files(model)
    model.requires_grad_(False)
    return model.to(device or current_device()) if precision.quantization == "none" else model


def _weight_options(precision: Precision) -> dict[str, Any]:
    import torch

    dtype = torch.bfloat16 if precision.uses_bf16 else torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if precision.quantization != "none":
        options["quantization_config"] = _quantization_config(precision.quantization, dtype)
        options["device_map"] = {"": current_device()}
    return options


def _quantization_config(quantization: str, dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _keep_trainable_after_eval(model: Any) -> None:
    """Stop 4-bit layers from repacking their weights for CPU inference.

    bitsandbytes 0.50 repacks on the first evaluation forward and never unpacks: from then on adapters get no gradient.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def checkpoint_activations(model: Any) -> None:
    """Let a model compute its activations again in the backward pass instead of keeping them."""
    with warnings.catch_warnings():
        # The name that works from transformers 5.5 on; 5.23 has a newer one beside it.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _let_go_of_files(model: Any) -> None:
    """Copy the weights that were not rounded: one that is still the file's own memory keeps the whole file in it."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


@contextmanager
def _quiet_load_report() -> Iterator[None]:
    """Hide transformers' table of missing keys: `check_loaded` reads the same report and refuses."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
