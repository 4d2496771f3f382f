"""The command-line options of every command that runs an engine."""

from __future__ import annotations

import argparse
from typing import Any

from align.engine.protocol import Sampling

_DEFAULTS = Sampling()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where models are and how they are loaded."""
    add = parser.add_argument
    add("--registry", metavar="DIR", help="where models live (else $ALIGN_REGISTRY, else ./align_registry)")
    add(
        "--base", metavar="DIR", help="where the base of the adapters is now, when it has moved; its content is checked"
    )
    add("--quantization", choices=["none", "nf4", "int8", "int4"], default="none", help="of the base model")
    on_or_off = argparse.BooleanOptionalAction
    add("--bf16", action=on_or_off, help="compute in bfloat16 (else where the accelerator does)")
    add("--debug", action="store_true", help="show tracebacks")


_SAMPLING = {
    "temperature": "0 is greedy",
    "top_p": "sample from the smallest set of tokens with this much probability; 1 is all",
    "top_k": "sample from this many of the likeliest tokens; 0 is all",
    "min_p": "sample from tokens at least this share as likely as the likeliest; 0 is all",
    "repetition_penalty": "divides the logits of tokens in prompt and answer; 1 is off",
    "frequency_penalty": "subtracted from a token's logit for each time it is in the answer; 0 is off",
    "presence_penalty": "subtracted once from the logit of every token in the answer; 0 is off",
    "max_new_tokens": "longest answer, in tokens",
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Sampling`, and the seed."""
    add = parser.add_argument
    for name, meaning in _SAMPLING.items():
        default = getattr(_DEFAULTS, name)
        add(f"--{name}", type=type(default), default=default, metavar="N", help=f"{meaning} (default {default})")
    add("--stop", action="append", default=[], metavar="TEXT", help="an answer ends before this; may be given again")
    add("--seed", type=int, default=None, metavar="N", help="same seed, same text; random without it")


def sampling_from(options: argparse.Namespace) -> Sampling:
    """Return the sampling asked for; raises UsageError when it is out of range."""
    return Sampling(stop=tuple(options.stop), **{name: getattr(options, name) for name in _SAMPLING})


def precision_from(options: argparse.Namespace) -> Any:
    """Return the precision asked for."""
    from align.models.loading import Precision

    return Precision(options.quantization, options.bf16)
