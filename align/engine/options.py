"""The command line options that every door to an engine has, so that they are spelt the same everywhere."""

from __future__ import annotations

import argparse
from typing import Any

from align.engine.protocol import Sampling

_DEFAULTS = Sampling()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where models are and how they are held in memory."""
    parser.add_argument(
        "--registry", metavar="DIR", help="where models live (else $ALIGN_REGISTRY, else ./align_registry)"
    )
    parser.add_argument("--quantization", choices=["none", "nf4", "int8"], default="none", help="how the base is held")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How answers are drawn."""
    parser.add_argument("--temperature", type=float, default=_DEFAULTS.temperature, metavar="T", help="0 is greedy")
    parser.add_argument(
        "--top_p", "--top-p", type=float, default=_DEFAULTS.top_p, metavar="P", help="nucleus; 1 is all"
    )
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=_DEFAULTS.max_new_tokens, metavar="N",
        help="longest answer, in tokens",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="same seed, same text; random without it")


def sampling_from(options: argparse.Namespace) -> Sampling:
    """The sampling that was asked for; UsageError when it is out of range."""
    return Sampling(options.temperature, options.top_p, options.max_new_tokens)


def precision_from(options: argparse.Namespace) -> Any:
    """The precision that was asked for."""
    from align.models.loading import Precision

    return Precision(options.quantization)
