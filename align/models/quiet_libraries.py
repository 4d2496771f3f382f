"""Telemetry, advice and harmless warnings of the Hugging Face libraries, switched off."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

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
    """Switch library telemetry and advice off, keeping values the user has set; before transformers is imported."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in _HARMLESS.items():
        warnings.filterwarnings("ignore", message=message, category=category)


def import_libraries(*names: str) -> None:
    """Import libraries that take seconds, quietly, behind a spinner on a terminal."""
    quiet_libraries()
    missing = [name for name in names if name not in sys.modules]
    if not sys.stderr.isatty():
        for name in missing:
            importlib.import_module(name)
    elif missing:
        with waiting(f"loading libraries: {', '.join(name.partition('.')[0] for name in missing)}"):
            for name in missing:
                importlib.import_module(name)
