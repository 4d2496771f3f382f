"""Telemetry, advice and harmless warnings of the libraries, switched off; and the kernels that they keep, bounded."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from align.waiting import waiting

_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

_COMPILED_KERNELS = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "128")
"""how many compiled products oneDNN keeps, and how many torch keeps of it. On a CPU every new number of tokens compiles
the products in bfloat16 anew, half a MiB each, about 45 a training step; of 1,024, the default, most are never used
again"""

ENGINE = ("torch", "transformers.modeling_utils", "peft")
"""the libraries that load a model and its adapters, and take seconds"""

_OPTIONAL = ("bitsandbytes", "wandb", "trackio", "mlflow", "comet_ml", "weave", "scipy", "sklearn")
"""packages that libraries import because they are installed, and that align imports itself where a run uses them"""

_AVAILABLE = {
    "is_bitsandbytes_available", "is_scipy_available", "is_sklearn_available", "is_bnb_available",
    "is_bnb_4bit_available",
}  # fmt: skip
"""functions of transformers and PEFT that remember which of these packages are there"""

_CHATTY = (
    # At import: that an optional kernel package for CPU inference is absent; we do not use that path.
    "bitsandbytes.backends.cpu.ops",
    # Once a layer: that int8 rounds its inputs to float16 on the way, which is how it works.
    "bitsandbytes.autograd._functions",
    # The first time on a machine, when that is slow: that it looks for fonts.
    "matplotlib.font_manager",
)

_HARMLESS = {
    # BEFT without biases in the base: merging refuses by itself.
    "Detected that the base layer has no bias term": UserWarning,
    # LN tuning, on layers it is made for.
    "Unsupported layer type .*Norm": UserWarning,
    # BOFT computes without its CUDA extension as well, and takes its own default.
    "Failed to load the CUDA extension": UserWarning,
    "Setting boft_n_butterfly_factor to 1": UserWarning,
    # SHiRA and FRoD multiply with sparse matrices that they make themselves.
    "Sparse invariant checks are implicitly disabled": UserWarning,
    # LoRA-GA asks for the gradient of weights, not of inputs.
    "Full backward hook is firing": UserWarning,
    # peft 0.21 asks transformers 5.23 by a name that is going away.
    "`is_gradient_checkpointing` is deprecated": FutureWarning,
    # It looks for the ranks of fused experts among modules, where they are not, and says that it found none.
    r"The following (rank|alpha)_pattern keys": RuntimeWarning,
}


def quiet_libraries() -> None:
    """Switch library telemetry and advice off, and bound what is kept of oneDNN; values the user has set stay.

    Before transformers is imported, and before the first product.
    """
    for key, value in (_QUIET | _COMPILED_KERNELS).items():
        os.environ.setdefault(key, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in _HARMLESS.items():
        warnings.filterwarnings("ignore", message=message, category=category)


def import_libraries(*names: str) -> None:
    """Import libraries that take seconds, behind a spinner on a terminal."""
    missing = [name for name in names if name not in sys.modules]
    if missing and sys.stderr.isatty():
        with waiting(f"loading libraries: {', '.join(name.partition('.')[0] for name in missing)}"):
            import_quietly(*missing)
    else:
        import_quietly(*missing)


def import_quietly(*names: str) -> None:
    """Import libraries without what they can do without, their advice, and garbage collection: all they make stays."""
    quiet_libraries()
    collects = gc.isenabled()
    gc.disable()
    try:
        with without_optional():
            for name in names:
                importlib.import_module(name)
    finally:
        if collects:
            gc.enable()


@contextmanager
def without_optional(*names: str) -> Iterator[None]:
    """Let libraries find these packages missing, by default all optional ones, unless they are imported already.

    Libraries import them wherever they are installed and do without them elsewhere. What a run asks for (nf4, a
    tracker) is imported by itself.
    """
    hidden = [name for name in names or _OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None stands for a module that is not there
    _forget_availability()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        _forget_availability()


def _forget_availability() -> None:
    """Let libraries look anew for the packages that are hidden or shown."""
    for module in filter(None, map(sys.modules.get, ("transformers.utils.import_utils", "peft.import_utils"))):
        for name in _AVAILABLE & vars(module).keys():
            getattr(module, name).cache_clear()
